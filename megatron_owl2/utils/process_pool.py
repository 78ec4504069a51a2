"""Process pool of the command lines: spawned, without SIGINT, ended with the parent process."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

import torch

# Forking a process that has threads can deadlock; spawning cannot.
SPAWN = multiprocessing.get_context("spawn")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class WorkerDiedError(Exception):
    """Death of a process of the pool, killed by the system; `items` are those in work."""

    def __init__(self, items: list[Any]):
        super().__init__("a process was killed, probably for lack of memory")
        self.items = items


class ProcessPool(ProcessPoolExecutor):
    """Pool of `count` processes with one thread each, for they are the parallelism.

    Every process first calls `start` with `arguments`. Ctrl-C reaches all processes of a terminal;
    these leave it to the one that gives them work.
    """

    def __init__(self, count: int, start: Callable | None = None, arguments: tuple = ()):
        super().__init__(count, SPAWN, _start, (start, arguments))
        self._count = count
        self._others = set(multiprocessing.active_children())

    def submit(self, work: Callable, /, *arguments) -> Future:
        """Future of work(*arguments); starts a process if all are busy."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process keeps it
        try:
            return super().submit(work, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def as_completed(
        self,
        work: Callable[[_Item], _Result],
        items: Iterable[_Item],
        poll: Callable[[], object] | None = None,
        period: float | None = None,
    ) -> Iterator[tuple[_Item, _Result]]:
        """Items with the results of work(item), in the order in which they are completed.

        `poll` is called every `period` seconds and after every completion. Raises what `work`
        raises, and WorkerDiedError if a process was killed.
        """
        todo = iter(items)
        in_work: dict[Future, _Item] = {}
        try:
            while True:
                # No more than there are processes: so these are the items that a killed one had.
                for item in islice(todo, self._count - len(in_work)):
                    in_work[self.submit(work, item)] = item
                if not in_work:
                    return
                done, _ = wait(in_work, period, FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    yield in_work.pop(future), result
                if poll is not None:
                    poll()
        except BrokenProcessPool:
            raise WorkerDiedError(list(in_work.values())) from None

    def kill(self) -> None:
        """Immediate end of the processes, whatever they do."""
        for process in set(multiprocessing.active_children()) - self._others:
            process.terminate()


def _start(start: Callable | None, arguments: tuple) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start(*arguments)


def _end_with_parent() -> None:
    """End of a process whose parent was killed, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
