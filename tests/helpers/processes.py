"""Processes and files as tests look at them from outside: torchrun, waiting, what is open."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import forked
import psutil

from megatron_owl2.mcore import setup


def torchrun(processes: int, *program: object) -> list[str]:
    """The command that starts a script, or `-m` and a module, in so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(processes), *map(str, program)]


def single_threaded(more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a job whose ranks share two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}


def start(
    program: Sequence[object],
    ranks: int = 0,
    *,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    fresh: bool = False,
) -> subprocess.Popen | forked.Job:
    """Start what follows `python` on a command line, a torchrun of so many `ranks` or anything
    else; its output is read by `communicate`.

    The interpreters are copies of one that has imported megatron-core (forked.py), unless they are
    to be `fresh`, have a path of their own, or use a GPU, whose driver does not outlive a copy.
    """
    arguments, env = list(map(str, program)), single_threaded(environment)
    if fresh or "PYTHONPATH" in (environment or {}) or not setup.on_cpu():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *arguments], env=env, cwd=folder, **pipes)
    return forked.Job(arguments, ranks, env, folder or Path.cwd())


def run_ranks(
    processes: int,
    *program: object,
    environment: dict[str, str] | None = None,
    timeout: float = 300,
    fresh: bool = False,
) -> subprocess.CompletedProcess:
    """Run a program to its end in ranks of torchrun, or alone; does not raise on failure.

    Ranks are in sessions of their own, so a job that runs out of time is killed one by one;
    raises subprocess.TimeoutExpired then. `fresh` is that of `start`.
    """
    ranks = processes if processes > 1 else 0  # a launcher is spared
    command = torchrun(ranks, *program)[1:] if ranks else program
    with (
        start(command, ranks, environment=environment, fresh=fresh) as job,
        killed_by_errors(job),
    ):
        out, err = job.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, job.returncode, out, err)


@contextmanager
def killed_by_errors(job: subprocess.Popen | forked.Job) -> Iterator[None]:
    """Kill the job and all that it started if anything is raised inside."""
    try:
        yield
    except BaseException:
        started: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):  # a copy that has ended is gone
            started = psutil.Process(job.pid).children(recursive=True)
        for process in [*started, job]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        raise


def wait_until(condition: Callable, seconds: float = 30):
    """The first true answer of `condition`, which fails the test by what it raises."""
    deadline, pause = time.monotonic() + seconds, 0.005
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} seconds"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.1)  # to ask can cost a process
    return answer


def group_is_gone(group: int) -> bool:
    """Whether no process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def open_below(folder: Path) -> int:
    """Number of files that this process has open below a folder."""
    found = 0
    for entry in os.scandir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found += os.readlink(entry.path).startswith(str(folder))
    return found
