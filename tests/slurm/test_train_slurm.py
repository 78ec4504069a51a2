"""Training jobs on a real Slurm of two nodes, which is set up for these tests on this machine.

The first life of a job stops inside its fifth step, where a signal or a kill meets it; see GATE.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import hooks
import pytest
import tiny_run
from paths import ROOT
from processes import wait_until

from megatron_owl2.training.checkpoint import directories

pytestmark = pytest.mark.slurm

CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
STEPS = 8
LONG = 400  # seconds, for a machine with other things to do
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
GATE = """
import os, pathlib, time
class Gated(trainer.Trainer):
    def forward_backward(self):
        first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        first &= os.environ.get("SLURM_ARRAY_TASK_ID", "1") == "1"
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 5 and first:
            gate = pathlib.Path(os.environ["GATE"], f"{os.environ['RANK']}.{os.getpid()}")
            gate.touch()
            while not self.stop._received:
                time.sleep(0.02)
        return super().forward_backward()
trainer.Trainer = Gated
"""
# Run by every Python process before anything else.
CRASH = """
import os
if "RANK" in os.environ:
    os._exit(7)
"""
SLOW_TO_BEGIN = """
import os, pathlib, time
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    pathlib.Path(os.environ["GATE"], "begun").touch()
    time.sleep(1000)
"""


class Cluster:
    """Jobs of two nodes with one rank each, all in `folder`."""

    def __init__(self, folder: Path, config: Path):
        self.folder, self.config = folder, config
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(
        self,
        output: Path,
        *overrides: str,
        script: str = "pretrain",
        python: str | None = None,
        gpus: str = "--gpus-per-node=1",
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> "Job":
        gate = output.parent / "gate"
        environment = self.environment | hooks.write(gate, GATE) | (environment or {})
        if python:
            (gate / "sitecustomize.py").write_text(python)
        environment |= {"VENV": sys.prefix, "GATE": str(gate), "MAX_CRASHES": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}  # the cluster's GPUs are in name only
        submitted = subprocess.run(
            [
                *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", gpus),
                *("--cpus-per-task=1", f"--output={gate}/job.log", *options),
                *(str(ROOT / "slurm" / f"{script}.sh"), str(self.config)),
                *(f"train.output={output}", *overrides),
            ],
            env=environment,
            capture_output=True,
            text=True,
            cwd=output.parent,
        )
        assert submitted.returncode == 0, submitted.stderr
        return Job(self, submitted.stdout.strip(), gate)


class Job:
    def __init__(self, cluster: Cluster, number: str, gate: Path):
        self.cluster, self.number, self.gate = cluster, number, gate

    def stats(self) -> dict[str, str]:
        text = self.cluster.ask("scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.partition("=")[::2] for word in text.splitlines()[0].split())

    @property
    def log(self) -> str:
        return (self.gate / "job.log").read_text()

    def ranks(self) -> dict[int, int]:
        """Ranks that stand in the gate and their processes, when it is all of them."""

        def standing():
            assert self.stats()["JobState"] not in OVER, self.log
            found = [p.name.split(".") for p in self.gate.iterdir() if p.name[0].isdigit()]
            return len(found) == 2 and {int(rank): int(process) for rank, process in found}

        return wait_until(standing, LONG)

    def signal(self, name: str) -> None:
        self.ranks()
        # Its status is no sign: of an element of an array it is 229 after the signal was sent. The
        # ranks leave their gate for a signal only.
        running = self.cluster.ask("squeue", "--noheader", "--states=RUNNING", "--format=%i")
        for number in running.split():
            command = ("scancel", f"--signal={name}", number)
            subprocess.run(command, env=self.cluster.environment, timeout=60)

    def end(self) -> dict[str, str]:
        """Wait until there is no other life to come; returns the job's stats.

        A job that is about to be queued again has, for a moment, failed too, but is still listed.
        """

        def over():
            listed = self.cluster.ask("squeue", "--noheader", f"--jobs={self.number}")
            stats = self.stats()
            return stats["JobState"] in OVER and not listed and stats

        try:
            return wait_until(over, LONG)
        except AssertionError:
            pytest.fail(f"{self.stats()}\n{self.log}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(
        ["bash", CLUSTER, "start", folder, str(os.getpid())],
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
    )
    if started.returncode == 77:
        pytest.skip(started.stdout.strip())
    try:
        assert started.returncode == 0, started.stdout
        yield Cluster(folder, tiny_run.make(folder, STEPS))
    finally:
        subprocess.run(["bash", CLUSTER, "stop", folder], check=True, timeout=100)


@pytest.fixture(scope="module")
def uninterrupted(cluster):
    """What torchrun makes of the same run on two ranks."""
    run = cluster.folder / "torchrun"
    done = tiny_run.train(cluster.config, run, "train.micro_batch_size=1", processes=2)
    assert done.returncode == 0, done.stderr
    return tiny_run.figures(run)


def finished(job: Job, output: Path, uninterrupted) -> str:
    """Assert that a run of two lives is the uninterrupted one; returns the job's log."""
    stats = job.end()
    log = job.log
    assert stats["JobState"] == "COMPLETED" and stats["Restarts"] == "1", log
    assert "slurm: the run is finished" in log
    assert tiny_run.figures(output) == uninterrupted
    return log


def test_an_array_has_as_many_lives_as_time_limits_ask_for(cluster, tmp_path, request):
    """Slurm looks for limits twice a minute, so a signal 95 seconds before two minutes are over
    comes after 25 to 55; meanwhile torchrun makes what the runs of this file are held against."""
    output = tmp_path / "run"
    options = ("--array=1-9%1", "--no-requeue", "--time=2", "--signal=USR1@95")
    job = cluster.submit(output, "train.micro_batch_size=1", options=options)
    uninterrupted = request.getfixturevalue("uninterrupted")
    wait_until(lambda: not cluster.ask("squeue", "--noheader"), LONG)
    assert tiny_run.figures(output) == uninterrupted, job.log
    assert "the run was stopped and goes on later, last checkpoint: iter_000000" in job.log
    # The second life too may be older than its signal.
    assert 2 <= job.log.count("slurm: job") < 9, "the rest was not needed"


def test_a_signal_saves_and_requeues_a_run_on_two_nodes(cluster, uninterrupted, tmp_path):
    output = tmp_path / "a run with {odd} 'name' of 100%t"
    shards = tmp_path / "shards elsewhere"
    shards.symlink_to(cluster.folder / "shards")
    job = cluster.submit(
        *(output, "train.micro_batch_size=1"), f"data.sources=[{{path: '{shards}', weight: 2}}]"
    )
    job.signal("USR1")
    log = finished(job, output, uninterrupted)
    assert "start 1, 2 ranks on 127.0.0.[2-3]" in log and "start 2, 2 ranks on" in log
    assert "the run was stopped and goes on later, last checkpoint: iter_0000005" in log
    assert f"continuing from {output}/checkpoints/iter_0000005 at step 5" in log
    for life in (0, 1):
        logs = output / "logs" / f"{job.number}-{life}"
        assert {p.name for p in logs.glob("rank-*")} == {"rank-00000.log", "rank-00001.log"}
    assert directories.read_config(output).data.sources[0].path == str(shards)


def test_a_killed_rank_ends_the_life_and_the_next_goes_on(cluster, uninterrupted, tmp_path):
    output = tmp_path / "run"
    options = ("train.micro_batch_size=1", "train.save_interval=2")
    job = cluster.submit(output, *options)
    os.kill(job.ranks()[1], signal.SIGKILL)
    wait_until(lambda: "slurm: crash" in job.log, 40)  # the other rank would wait for minutes
    log = finished(job, output, uninterrupted)
    assert "exit code 137" in log and f"continuing from {output}/checkpoints/iter_000000" in log


def test_a_more_urgent_job_takes_the_nodes_and_gives_them_back(cluster, uninterrupted, tmp_path):
    output = tmp_path / "run"
    job = cluster.submit(output, "train.micro_batch_size=1", options=("--partition=test",))
    job.ranks()
    urgent = ("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    cluster.ask(*urgent, "--wrap=sleep 1")
    log = finished(job, output, uninterrupted)
    assert f"continuing from {output}/checkpoints/iter_0000005 at step 5" in log


def test_an_interrupted_run_ends_with_a_checkpoint(cluster, uninterrupted, tmp_path):
    output = tmp_path / "run"
    job = cluster.submit(output, "train.micro_batch_size=1", gpus="--gres=gpu:1")
    job.signal("INT")
    stats = job.end()
    assert (stats["JobState"], stats["ExitCode"], stats["Restarts"]) == ("FAILED", "130:0", "0")
    assert "the run was interrupted, last checkpoint: iter_0000005" in job.log
    assert tiny_run.figures(output) == uninterrupted[:5]


def test_a_signal_before_the_ranks_are_there_is_not_the_end(cluster, tmp_path):
    job = cluster.submit(tmp_path / "run", "parallel.tensor=3", python=SLOW_TO_BEGIN)
    wait_until((job.gate / "begun").exists, LONG)
    cluster.ask("scancel", "--signal=USR1", job.number)
    stats = job.end()
    assert (stats["ExitCode"], stats["Restarts"]) == ("2:0", "1"), job.log
    assert "slurm: the run was stopped before it began and goes on later" in job.log


def test_a_wrong_setting_is_not_tried_again(cluster, tmp_path):
    job = cluster.submit(tmp_path / "run", "parallel.tensor=3", script="finetune")
    wrong(job)
    assert {p.name for p in tmp_path.rglob("rank-*")} == {"rank-00000.log", "rank-00001.log"}


def wrong(job: Job) -> None:
    stats = job.end()
    assert (stats["JobState"], stats["ExitCode"], stats["Restarts"]) == ("FAILED", "2:0", "0")
    assert "error: 2 processes cannot be divided by parallel.tensor (3)" in job.log


def test_ranks_run_in_a_container(cluster, tmp_path):
    """A program of apptainer's name takes the command apart and runs it outside of one."""
    calls, folder = tmp_path / "calls", tmp_path / "programs"
    folder.mkdir()
    program = folder / "apptainer"
    program.write_text(
        f'#!/bin/bash\nprintf "%s|" "${{@:1:8}}" >> "{calls}"\necho >> "{calls}"\n'
        f'shift 8\nexec "{sys.executable}" "$@"\n'
    )
    program.chmod(0o755)
    image = tmp_path / "an image.sif"
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CONTAINER_IMAGE": str(image),
        "CONTAINER_MOUNTS": "/data:/data",
    }
    wrong(cluster.submit(tmp_path / "run", "parallel.tensor=3", environment=environment))
    mounts = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},/data:/data"
    call = f"exec|--nv|--bind|{mounts}|--pwd|{tmp_path}|{image}|python|"
    assert calls.read_text().splitlines() == [call] * 3  # what proves the configuration, two ranks


def test_crashes_in_a_row_have_an_end(cluster, tmp_path):
    job = cluster.submit(tmp_path / "run", python=CRASH)
    stats = job.end()
    # The job's code is the greatest of its ranks', of which Slurm may have ended one itself.
    assert (stats["JobState"], stats["Restarts"]) == ("FAILED", "1"), job.log
    assert stats["ExitCode"] in ("7:0", "143:0") and "(exit code " in job.log
    assert "slurm: no further start after 2 crashes in a row" in job.log


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_outside_of_slurm_the_scripts_say_what_they_are(name):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(
        ["bash", ROOT / "slurm" / f"{name}.sh"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert done.stderr == f"error: this is a job script; submit it: sbatch slurm/{name}.sh ...\n"
