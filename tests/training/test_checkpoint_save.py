"""Checkpoints are written while the training goes on: the same bytes, failures that reach all
ranks, and old ones that are let go."""

import subprocess
import sys
from collections import Counter

import faults
import pytest
import stored
import tiny_run
import torch

from megatron_owl2.training.checkpoint import directories
from megatron_owl2.training.checkpoint.index import read_index
from megatron_owl2.training.checkpoint.manager import expired

pytestmark = pytest.mark.distributed

# No file is written before the next step is in the metrics, or the run is over.


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("save"), 5)


def test_what_is_written_is_the_state_of_the_step_though_training_goes_on(config, tmp_path):
    options = ["train.save_interval=4", "train.micro_batch_size=1", "train.precision=bf16"]
    waiting, going_on = tmp_path / "waiting", tmp_path / "going on"
    done = tiny_run.train(config, waiting, *options, "train.async_save=false", processes=2)
    assert done.returncode == 0, done.stderr
    done = tiny_run.train(
        config,
        going_on,
        *options,
        processes=2,
        environment={"METRICS": str(going_on / "metrics.jsonl")},
        fault=faults.writes_slowly,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (saved,) = [n for n, line in enumerate(lines) if line.endswith("iter_0000004")]
    (later,) = [n for n, line in enumerate(lines) if line.startswith("pretrain 5/5")]
    assert later < saved, "the last step was to be done while the files were not yet written"
    for step in ("iter_0000004", "iter_0000005"):
        one, other = (run / "checkpoints" / step for run in (waiting, going_on))
        expected, found = stored.read(one), stored.read(other)
        assert found.keys() == expected.keys() and len(found) > 300
        assert all(found[name].equal(expected[name]) for name in expected)
        assert read_common(one) == read_common(other)
        progress = [directories.read_progress(directory) for directory in (one, other)]
        assert [p.pop("counts")["seen/0"] for p in progress] == [8 * int(step[-1])] * 2
        assert progress[0] == progress[1]


def read_common(directory):
    """Groups and schedule, comparable."""
    return str(torch.load(directory / "common.pt", weights_only=False))


def test_every_rank_writes_what_it_holds_and_nobody_more(config, tmp_path):
    run = tmp_path / "run"
    done = tiny_run.train(config, run, "train.micro_batch_size=1", processes=4)
    assert done.returncode == 0, done.stderr
    written = {"optimizer": Counter(), "model": Counter()}
    for index, place in read_index(directories.resolve(run)).storage_data.items():
        kind = "optimizer" if index.fqn.startswith("optimizer.") else "model"
        written[kind][place.relative_path.split("_")[2]] += place.length
    for kind, shares in written.items():
        assert sorted(shares) == ["0", "1", "2", "3"], kind
        assert max(shares.values()) < 0.4 * shares.total(), kind


@pytest.mark.parametrize(
    "fault, reason",
    [
        (faults.share_of_rank_1_is_too_large, "File too large"),
        (faults.no_space_for_what_is_common, "No space"),
        (faults.no_space_for_the_index, "No space"),
    ],
)
def test_a_disk_that_refuses_ends_all_ranks_and_names_the_checkpoint(
    config, tmp_path, fault, reason
):
    run = tmp_path / "run"
    options = ["train.save_interval=1", "parallel.tensor=2", "health.step_timeout=100"]
    done = tiny_run.train(config, run, *options, processes=2, fault=fault)
    assert done.returncode != 0
    for rank in (0, 1):
        (line,) = [x for x in done.stderr.splitlines() if x.startswith(f"error: rank {rank}: ")]
        assert str(run / "checkpoints") in line and "iter_0000001" in line
        assert "could not be written" in line and reason in line
    assert not list((run / "checkpoints").glob("iter_*"))
    assert not (run / "checkpoints" / directories.LATEST).exists()


ALONE = """
import sys, threading
from pathlib import Path
import torch
from megatron_owl2.config.schema import ParallelConfig
from megatron_owl2.mcore import setup
setup.setup()
from megatron_owl2.training.checkpoint import async_writer
from megatron_owl2.training.checkpoint.staging import Staging
from megatron.core.utils import make_sharded_tensor_for_checkpoint as share
groups = setup.initialize(ParallelConfig())
where = {"tp_group": groups.tp, "dp_cp_group": groups.dp_cp}
save, count, pause = torch.save, int(sys.argv[1]), float(sys.argv[2])
go_on = threading.Event()
def slow(data, file):
    if isinstance(data, torch.Tensor):
        go_on.wait(pause)
    save(data, file)
torch.save = slow
tensors = {str(n): torch.full((3,), float(n)) for n in range(count)}
state = {name: share(tensor, name, **where) for name, tensor in tensors.items()}
writing = async_writer.Writing(state, Path(sys.argv[3]), Staging())
"""


def alone(program: str, *arguments) -> subprocess.CompletedProcess:
    """Run ALONE, which writes so many tensors with so many seconds before each, unless
    `go_on` is set, and then `program`."""
    return subprocess.run(
        [sys.executable, "-c", ALONE + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=150,
    )


def test_the_process_of_a_run_that_failed_does_not_wait_for_its_files(tmp_path):
    done = alone("sys.exit(3)", 100, 5, tmp_path)
    assert done.returncode == 3, done.stderr


def test_what_changes_after_the_start_is_not_written(tmp_path):
    change = "assert not writing.ended; [tensor.zero_() for tensor in tensors.values()]; "
    done = alone(change + "go_on.set(); writing.finish()", 4, 100, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {k: v.tolist() for k, v in stored.read(tmp_path).items()} == {
        str(n): [float(n)] * 3 for n in range(4)
    }


@pytest.mark.parametrize(
    "steps, newest, last, every, gone",
    [
        ([1, 2, 3, 4], 4, 0, 0, []),
        ([1, 2, 3, 4], 4, 0, 2, []),
        ([1, 2, 3, 4], 4, 2, 0, [1, 2]),
        ([1, 2, 3, 4], 4, 1, 2, [1, 3]),
        ([1, 2, 3, 4], 4, 9, 0, []),
        ([4, 1, 3, 2, 8, 9], 4, 1, 0, [1, 2, 3]),  # 8 and 9: the run was set back
    ],
)
def test_what_is_let_go(steps, newest, last, every, gone):
    assert expired(steps, newest, last, every) == gone


def test_a_run_keeps_the_newest_and_the_milestones(config, tmp_path):
    run = tmp_path / "run"
    options = ["train.save_interval=1", "train.keep_last=2", "train.keep_every=3"]
    for name in (".iter_0000077.partial", ".iter_0000078.removed"):  # of runs that were killed
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "data").write_text("half")
    done = tiny_run.train(config, run, *options, "train.steps=7")
    assert done.returncode == 0, done.stderr
    assert listed(run) == ["iter_0000003", "iter_0000006", "iter_0000007", "latest"]
    tiny_run.set_back(run, 3)
    done = tiny_run.train(config, run, *options, "train.steps=5")
    assert done.returncode == 0, done.stderr
    kept = [f"iter_000000{step}" for step in (3, 4, 5, 6, 7)]
    assert listed(run) == [*kept, "latest"]
    assert directories.resolve(run).name == "iter_0000005"


def listed(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())
