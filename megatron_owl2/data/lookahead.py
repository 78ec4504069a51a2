"""Fetching ahead: chunks of the windows that a process will read next, before it asks for them.

The order is known, so when a lane enters a window, the chunks of this window and of the next are
queued. Only storage behind a network needs it.
"""

import copy
import os
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

from megatron_owl2.data.dataset import Dataset
from megatron_owl2.data.manifest import ShardError
from megatron_owl2.data.order import Order
from megatron_owl2.data.storage import LocalStorage, StorageError


class LookAhead:
    """Queues the chunks that the slots after the present one will read.

    The thread belongs to the process that asks first; it is a daemon, so that it never holds a
    process up, and it has data sets of its own, since those are not made for two threads. A fetch
    that fails here is tried again, and reported, when the sample is read.
    """

    def __init__(self, datasets: Sequence[Dataset], order: Order):
        self._datasets, self._order = datasets, order
        self._remote = [not isinstance(d.storage, LocalStorage) for d in datasets]
        self._windows: dict[int, tuple[int, int]] = {}  # lane -> its present epoch and window
        self._queue: SimpleQueue | None = None
        self._process = 0

    def at(self, slot: int) -> None:
        """Say which slot is read now."""
        if not any(self._remote):
            return
        if self._process != os.getpid():
            self._start()
        epoch, lane, window = self._order.window(slot)
        if self._windows.get(lane) == (epoch, window):
            return
        self._windows[lane] = (epoch, window)
        for ahead in (0, 1):
            for source, shard, sample in self._order.chunks(slot, ahead):
                if self._remote[source]:
                    self._queue.put((source, shard, sample))

    def _start(self) -> None:
        self._process, self._windows, self._queue = os.getpid(), {}, SimpleQueue()
        datasets = [copy.deepcopy(dataset) for dataset in self._datasets]
        Thread(target=_fetch, args=(self._queue, datasets), daemon=True).start()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_queue": None, "_process": 0}


def _fetch(queue: SimpleQueue, datasets: Sequence[Dataset]) -> None:
    while True:
        source, shard, sample = queue.get()
        with suppress(StorageError, ShardError):
            datasets[source].prefetch(shard, sample)
