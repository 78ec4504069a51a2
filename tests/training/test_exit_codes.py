"""Exit codes of ranks: 2 where trying again does not help, 1 where it may."""

import os
import shutil
import signal
import socket
from contextlib import ExitStack, nullcontext
from pathlib import Path

import faults
import pytest
import tiny_run
import torch
from processes import killed_by_errors, start, wait_until

from megatron_owl2.config.load import load_config
from megatron_owl2.config.machine import check_machine
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.errors import ConfigError, MachineError
from megatron_owl2.training.checkpoint import directories

pytestmark = pytest.mark.distributed


class Ranks:
    """The ranks of a job, each on a node of its own, started without a launcher that would end
    them: their exit codes and what they say."""

    def __init__(self, *folders: Path, program: list[str], environment: dict[str, str]):
        # A store that is there already, as torchrun's is, has a port that nobody else can take.
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        place |= {"LOCAL_RANK": "0", "WORLD_SIZE": str(len(folders))}
        self.jobs = [
            start(program, environment=environment | place | {"RANK": str(rank)}, folder=folder)
            for rank, folder in enumerate(folders)
        ]

    def end(self) -> list[tuple[int, list[str]]]:
        """Exit code and errors said, by rank."""
        with ExitStack() as stack:
            for job in self.jobs:
                stack.enter_context(job)
                stack.enter_context(killed_by_errors(job))
            said = [job.communicate(timeout=200)[1] for job in self.jobs]
        errors = [[x for x in text.splitlines() if x.startswith("error: ")] for text in said]
        return list(zip([job.returncode for job in self.jobs], errors, strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A configuration, and a run of one step that has saved."""
    folder = tmp_path_factory.mktemp("exit")
    config = tiny_run.make(folder, 1)
    done = tiny_run.train(config, folder / "run")
    assert done.returncode == 0, done.stderr
    return config, folder / "run"


def two_ranks(config, output, *overrides, fault=None):
    options = ["train.micro_batch_size=1", *overrides]
    program = tiny_run.program(config, output, options, fault)
    return Ranks(output.parent, output.parent, program=program, environment={})


def test_a_full_disk_may_be_empty_tomorrow(saved, tmp_path):
    ends = two_ranks(
        saved[0], tmp_path / "run", "parallel.tensor=2", fault=faults.disk_of_rank_1_is_full
    ).end()
    assert [code for code, _ in ends] == [1, 1]
    assert all("No space left on device" in line for _, (line,) in ends)


def test_a_mistake_shows_where_it_is_and_ends_all_ranks(saved, tmp_path):
    ends = two_ranks(saved[0], tmp_path / "run", fault=faults.mistake_in_the_code).end()
    assert [code for code, _ in ends] == [1, 1]
    assert ends[0][1] == [] and "a mistake of ours" in ends[1][1][0]  # rank 0 has the traceback


def test_a_rank_that_is_lost_while_a_checkpoint_is_read_is_no_damage_of_it(saved):
    config, run = saved
    ends = two_ranks(config, run, "train.steps=2", fault=faults.rank_1_is_lost_while_it_reads).end()
    assert [code for code, _ in ends] == [1, -signal.SIGKILL]


def test_a_damaged_checkpoint_stays_so(saved, tmp_path):
    config, run = saved
    start = directories.resolve(run)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in start.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-40] if file.name == "common.pt" else content)
    ends = two_ranks(config, tmp_path / "run", f"stage.initial_checkpoint={broken}").end()
    assert [code for code, _ in ends] == [2, 2]
    assert all(f"{broken} cannot be read" in line for _, (line,) in ends)


def test_a_node_that_lacks_a_file_says_which_it_is(saved, tmp_path):
    config, _ = saved
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    (here / "tokenizer.model").write_bytes((config.parent / "tokenizer.model").read_bytes())
    options = ["data.tokenizer=tokenizer.model", "train.micro_batch_size=1"]
    program = tiny_run.program(config, tmp_path / "run", options)
    ranks = Ranks(here, there, program=program, environment={})
    wait_until(lambda: ranks.jobs[1].poll() is not None, 100)
    ranks.jobs[0].kill()  # it waits for the other, as srun and torchrun do not let it
    (_, _), (code, (line,)) = ranks.end()
    assert code == 2
    assert line.startswith(f"error: rank 1 on {socket.gethostname()}: data.tokenizer: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the GPUs of this machine")
def test_gpus_that_torch_does_not_see_are_not_left_idle(saved, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)  # as in the child
    program = tiny_run.program(saved[0], tmp_path / "run", [], faults.torch_is_built_for_the_cpu)
    ranks = Ranks(tmp_path, program=program, environment={"SLURM_GPUS_ON_NODE": "8"})
    ((code, (line,)),) = ranks.end()
    assert code == 2 and "has GPUs, but torch" in line

    config = load_config(saved[0])
    for gpus, visible, refused in (
        ("8", "0,1", True),
        ("8", "", False),
        ("0", None, os.path.exists("/dev/nvidia0")),
    ):
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", gpus)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        else:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        with pytest.raises(ConfigError, match="has GPUs, but torch") if refused else nullcontext():
            check_machine(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the GPUs of this machine")
def test_a_driver_that_does_not_run_is_no_matter_of_the_configuration(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(MachineError, match=f"none of the GPUs of {socket.gethostname()}"):
        check_machine(RunConfig())


@pytest.mark.versions  # from 0.18 on every rank reads alone
def test_a_device_that_fails_while_a_checkpoint_is_read_is_no_damage_of_it(saved):
    config, run = saved
    ends = two_ranks(
        config, run, "train.steps=2", fault=faults.device_of_rank_1_fails_while_it_reads
    ).end()
    assert [code for code, _ in ends] == [1, 1]
    assert all("CUDA out of memory" in line for _, (line,) in ends)


@pytest.mark.parametrize("seconds, codes", [("100", [0, 0]), ("0", [1, 1])])
def test_a_node_may_see_a_checkpoint_later_than_the_first(
    saved, tmp_path, seconds, codes, monkeypatch
):
    monkeypatch.setenv("SEEN_WITHIN", seconds)
    config, run = saved
    shutil.copytree(run, tmp_path / "run")
    ends = two_ranks(
        config, tmp_path / "run", "train.steps=2", fault=faults.rank_1_sees_files_late
    ).end()
    assert [code for code, _ in ends] == codes
    assert all("but not on" in line for code, lines in ends if code for line in lines)
