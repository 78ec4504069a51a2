"""Programs that begin in copies of one process, which has imported torch and megatron-core.

Importing them costs every process three seconds of a processor, more than most ranks compute. As a
program this file is that process; a Job tells it what to start. torchrun is torchrun there too, but
for a rank it takes a copy that waits where it would start an interpreter.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory


class Job:
    """What follows `python` on a command line, run in a copy; in use like a Popen with pipes.

    `ranks` is how many of its own a torchrun starts, 0 for any other program.
    """

    _idle: list[subprocess.Popen] = []  # servers; each runs one job at a time

    def __init__(
        self, program: Sequence[str], ranks: int, environment: Mapping[str, str], folder: Path
    ) -> None:
        self.args, self.returncode = program, None
        self._server = self._idle.pop() if self._idle else _start_server()
        self._folder = TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("out", "err")]
        for path in self._outputs:  # also of one that is killed at once
            path.touch()
        request = program, ranks, dict(environment), str(folder), *map(str, self._outputs)
        print(json.dumps(request), file=self._server.stdin, flush=True)
        self.pid = _next_number(self._server)

    def communicate(self, timeout: float) -> list[str]:
        """Its output and errors, once it has ended; raises subprocess.TimeoutExpired."""
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return [path.read_text() for path in self._outputs]

    def output(self) -> str:
        """What it has written so far."""
        return self._outputs[0].read_text()

    def poll(self, timeout: float = 0) -> int | None:
        if self.returncode is None and select.select([self._server.stdout], [], [], timeout)[0]:
            self._wait()
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self._folder.cleanup()

    def _wait(self) -> None:
        if self.returncode is None:
            self.returncode = _next_number(self._server)
            self._idle.append(self._server)


def _next_number(server: subprocess.Popen) -> int:
    """What a server tells, read without a buffer: `select` looks for what comes after it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(server.stdout.fileno(), 1)
        assert byte, "the process that is copied has ended; its errors are above"
        line += byte
    return int(line)


def _start_server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, "-u", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    atexit.register(server.wait)
    atexit.register(server.kill)  # first; it is idle then
    return server


class Rank:
    """A rank of torchrun: a copy of its process from before it began, in place of a Popen."""

    waiting: list["Rank"] = []

    def __init__(self) -> None:
        """In the copy this returns once `start` was called, with its arguments in `given`."""
        self.returncode: int | None = None
        self.given = ""
        source, self._told = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._told)
            self.given = os.fdopen(source).readline()  # copies after it keep the pipe open
            if not self.given:  # torchrun has not come that far
                os._exit(0)
            os.setsid()
        else:
            os.close(source)

    @classmethod
    def start(cls, args: Sequence[str], env: Mapping[str, str], **_: object) -> "Rank":
        """What torchrun calls Popen with."""
        rank = cls.waiting.pop(0)
        with os.fdopen(rank._told, "w") as told:
            print(json.dumps([args, dict(env)]), file=told)
        return rank

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        return code


def _serve() -> tuple[list[str], int]:
    """Start a copy of this process for every request; returns what is to be run, in the copy."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    while line := requests.readline():
        pid = os.fork()
        if not pid:
            requests.close(), replies.close()
            return _prepare(*json.loads(line))
        print(pid, file=replies, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=replies, flush=True)
    sys.exit()


def _prepare(
    program: list[str], ranks: int, environment: dict[str, str], folder: str, out: str, err: str
) -> tuple[list[str], int]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    writes = os.O_WRONLY | os.O_APPEND
    for number, (path, mode) in enumerate(
        ((os.devnull, os.O_RDONLY), (out, writes), (err, writes))
    ):
        file = os.open(path, mode)
        os.dup2(file, number)
        os.close(file)
    return program, ranks


def _become_rank(rank: Rank) -> list[str]:
    (_, *program), environment = json.loads(rank.given)
    os.environ.clear()
    os.environ.update(environment)
    return program[program[0] == "-u" :]


def _start_ranks(number: int) -> list[str] | None:
    """Make torchrun take copies of this process; returns a rank's program, in a copy."""
    for _ in range(number):
        rank = Rank()
        if rank.given:
            return _become_rank(rank)
        Rank.waiting.append(rank)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = Rank.start
    return None


def _import() -> None:
    """Import what all programs need, and see that nothing of it minds to be copied."""
    import prepared  # noqa: F401
    import torch._dynamo  # which every optimizer imports
    import torch.distributed.launcher.api  # noqa: F401

    import megatron_owl2.training.trainer  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, which end this
    assert len(os.listdir("/proc/self/task")) == 1, "a copy has no other threads than the first"
    gc.collect()
    gc.freeze()  # pages of what is there stay shared


if __name__ == "__main__":
    _import()
    what, of_torchrun = _serve()
    what = (of_torchrun and _start_ranks(of_torchrun)) or what
    if what[0] == "-m":
        sys.argv[:], sys.path[0] = what[1:], os.getcwd()
        runpy.run_module(what[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:], sys.path[0] = what, str(Path(what[0]).parent)
        runpy.run_path(what[0], run_name="__main__")
