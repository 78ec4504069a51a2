"""python tests/helpers/kill_runs.py --kills 20: runs whose ranks are killed again and again lose
nothing.

A run that saves every second step is started, one of its ranks is killed (SIGKILL) at a random
moment or in the midst of a save, and it is started again, until it has been killed often enough
and may finish. After every kill nothing of the job is left within seconds, and whatever looks like
a checkpoint is read whole. In the end all losses equal those of a run that nobody killed.
"""

import argparse
import contextlib
import random
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import stored
import tiny_run
import torch
from processes import single_threaded, torchrun

from megatron_owl2.training.checkpoint import directories

PARALLELISMS = {"DP 2": ["train.micro_batch_size=1"], "TP 2": ["parallel.tensor=2"]}
PROCESSES = 2
OPTIONS = ["train.save_interval=2", "train.keep_last=3", "data.workers=1"]
KINDS = ["in a save", "in a save", "after some steps", "in a save", "at the start"]
LEFT_SECONDS = 30
_OF_AN_EARLIER_LIFE = 0o700


@dataclass
class Kill:
    """Findings after a kill."""

    parallelism: str
    rank: int
    seconds: float  # from the start of the job
    went_on: int  # the step that this job had gone on from
    steps: int  # that it had done since
    in_save: str  # the checkpoint that was being written, or ""
    ended_after: float  # seconds until no process was left
    checkpoints: list[str]  # that look whole, each read

    def __str__(self) -> str:
        doing = f"in the save of {self.in_save}" if self.in_save else "not in a save"
        return (
            f"{self.parallelism}: went on from step {self.went_on}, rank {self.rank} killed after "
            f"{self.seconds:.2f} s and {self.steps} steps, {doing}; nothing left after "
            f"{self.ended_after:.1f} s; whole: {', '.join(self.checkpoints) or 'none'}"
        )


def kill_once(
    config: Path, run: Path, parallelism: str, chance: random.Random, kind: str, start: float
) -> Kill:
    """Start the job and kill one rank: `in a save`, `at the start` (of its life, in the first
    `start` seconds), or `after some steps`."""
    rank, folder, told = chance.randrange(PROCESSES), run / "checkpoints", run.with_suffix(".log")
    for path in folder.glob(".iter_*.partial"):
        path.chmod(_OF_AN_EARLIER_LIFE)
    with told.open("w") as log:
        job = subprocess.Popen(
            torchrun(
                PROCESSES, *tiny_run.program(config, run, [*OPTIONS, *PARALLELISMS[parallelism]])
            ),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=single_threaded(),
        )
    started = time.monotonic()
    if kind == "in a save":
        seen, saves = set(), chance.randint(1, 3)  # the first, second or third of this life

        def begun() -> bool:
            seen.update(_partial(folder))
            return len(seen) == saves

        _until(begun, job, told)
        time.sleep(chance.uniform(0, 0.03))
    elif kind == "at the start":
        _until(lambda: _rank(job, rank), job, told)
        time.sleep(chance.uniform(0, start))
    else:
        steps = chance.randint(1, 6)
        _until(lambda: len(_said(told, "pretrain ")) >= steps, job, told)
        time.sleep(chance.uniform(0, 0.3))
    processes = psutil.Process(job.pid).children(recursive=True)
    seconds = time.monotonic() - started
    _rank(job, rank).send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait(timeout=300) != 0, told.read_text()
    _, alive = psutil.wait_procs(processes, timeout=LEFT_SECONDS)
    assert not alive, f"outlived the job: {alive}"
    return Kill(
        parallelism,
        rank,
        seconds,
        next((int(line.rsplit(" ", 1)[1]) for line in _said(told, "continuing from ")), 0),
        len(_said(told, "pretrain ")),
        next(iter(_partial(folder)), ""),
        time.monotonic() - killed,
        read_all(folder),
    )


def read_all(folder: Path) -> list[str]:
    """Names of all that looks like a checkpoint, every tensor of it read; `latest` among them."""
    whole = sorted(folder.glob("iter_*"))
    for directory in whole:
        assert directories.resolve(directory) == directory
        stored.read(directory)
        torch.load(directory / "common.pt", weights_only=False)
        assert directories.read_progress(directory)["step"] == int(directory.name[5:])
    if (folder / directories.LATEST).exists():
        assert directories.resolve(folder) in whole
    return [directory.name for directory in whole]


def prove(folder: Path, kills: dict[str, list[str]], seed: int) -> list[Kill]:
    """Kill runs of every parallelism in the ways given; hold them against one left alone."""
    steps = 10 * max(map(len, kills.values())) + 2
    config = tiny_run.make(folder, steps)
    chance, found = random.Random(seed), []
    for parallelism, kinds in kills.items():
        run, whole = folder / f"{parallelism} killed", folder / f"{parallelism} whole"
        overrides = [*OPTIONS, *PARALLELISMS[parallelism]]
        started = time.monotonic()
        done = tiny_run.train(config, whole, *overrides, processes=PROCESSES)
        assert done.returncode == 0, done.stderr
        start = (time.monotonic() - started - tiny_run.rows(whole)[-1]["seconds"]) / 2
        for kind in kinds:
            found.append(kill_once(config, run, parallelism, chance, kind, start))
            print(f"{len(found)}. {found[-1]}", flush=True)
        done = tiny_run.train(config, run, *overrides, processes=PROCESSES)
        assert done.returncode == 0, done.stderr
        assert tiny_run.figures(run) == tiny_run.figures(whole)
        assert [step for step, *_ in tiny_run.figures(run)] == list(range(1, steps + 1))
        print(f"{parallelism}: {steps} losses and gradient norms equal bit for bit", flush=True)
    hits = sum(bool(kill.in_save) for kill in found)
    print(f"{len(found)} kills, {hits} of them in saves", flush=True)
    return found


def _partial(folder: Path) -> set[str]:
    """The saves of this life that have begun and are not complete."""
    found = set()
    for path in folder.glob(".iter_*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_IMODE(path.stat().st_mode) != _OF_AN_EARLIER_LIFE:
                found.add(path.name[1:].removesuffix(".partial"))
    return found


def _said(told: Path, start: str) -> list[str]:
    return [line for line in told.read_text().splitlines() if line.startswith(start)]


def _until(condition: Callable[[], object], job: subprocess.Popen, told: Path) -> None:
    while not condition():
        assert job.poll() is None, f"the run has ended: {told.read_text()}"
        time.sleep(0.001)


def _rank(job: subprocess.Popen, rank: int) -> psutil.Process | None:
    """The process of a rank, once the launcher has started it."""
    for process in psutil.Process(job.pid).children():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                return process
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    turns = [KINDS[turn % len(KINDS)] for turn in range(arguments.kills)]
    with tempfile.TemporaryDirectory() as place:
        parallelisms = dict(zip(PARALLELISMS, (turns[::2], turns[1::2]), strict=True))
        prove(Path(place), parallelisms, arguments.seed)
