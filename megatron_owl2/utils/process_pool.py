"""Process pool of the commands: spawned, ignoring Ctrl-C, ended with their parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor

import torch

# Forking a process that has threads can deadlock; spawning cannot.
SPAWN = multiprocessing.get_context("spawn")


class ProcessPool(ProcessPoolExecutor):
    """Pool of `count` spawned processes with one thread each.

    Every process first calls `start` with `arguments`. Ctrl-C reaches all processes of a terminal;
    these leave it to the one that gives them work.
    """

    def __init__(self, count: int, start: Callable | None = None, arguments: tuple = ()):
        super().__init__(count, SPAWN, _start, (start, arguments))
        self._others = set(multiprocessing.active_children())

    def submit(self, work: Callable, /, *arguments) -> Future:
        """Have work(*arguments) called; starts a process if all are busy."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process keeps it
        try:
            return super().submit(work, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def kill(self) -> None:
        """End the processes at once, whatever they do."""
        for process in set(multiprocessing.active_children()) - self._others:
            process.terminate()


def _start(start: Callable | None, arguments: tuple) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start(*arguments)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a spawned process has one"
    parent.join()
    os._exit(1)
