"""Fetching ahead: chunks of the windows that a process will read next, before it asks for them.

The order is known, so when a lane enters a window, the chunks of this window and of the next are
queued. Only storage behind a network needs it.
"""

import copy
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

from megatron_owl2.data.sampling.shuffle import BLOCK_SIZE, SHUFFLE_BLOCK_SIZE, ShuffleOrder
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.storage import LocalStorage
from megatron_owl2.errors import ShardError, StorageError


class Prefetcher:
    """Queues the chunks that the slots after the present one will read.

    The thread belongs to the process that asks first; it is a daemon, so that it never holds a
    process up, and it has data sets of its own, since those are not made for two threads. A fetch
    that fails here is tried again, and reported, when the sample is read.
    """

    def __init__(self, datasets: Sequence[ShardedDataset], order: ShuffleOrder):
        self._datasets, self._order = datasets, order
        self._remote = [not isinstance(d.storage, LocalStorage) for d in datasets]
        self._windows: dict[int, tuple[int, int]] = {}  # lane -> its present epoch and window
        self._queue: SimpleQueue | None = None
        self._copies: list[ShardedDataset] = []
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
        for first in (slot, self._order.next_window(slot)):
            for source, shard, sample in self._order.chunks(first):
                if self._remote[source]:
                    self._queue.put((source, shard, sample))

    @property
    def retries(self) -> int:
        """Requests that this process had to repeat while looking ahead."""
        return int(sum(copy.storage.counters["retries"] for copy in self._copies))

    def close(self) -> None:
        """End the thread after what it does; `at` starts another."""
        if self._process == os.getpid():
            self._queue.put(None)
        self._process, self._queue = 0, None

    def _start(self) -> None:
        self._process, self._windows, self._queue = os.getpid(), {}, SimpleQueue()
        self._copies = [copy.deepcopy(dataset) for dataset in self._datasets]
        work = (self._queue, self._copies)
        Thread(target=_fetch, args=work, name="look-ahead", daemon=True).start()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_queue": None, "_process": 0}


def working_set(
    datasets: Sequence[ShardedDataset], order: ShuffleOrder, ranks: int, ranks_on_node: int
) -> int:
    """About how many bytes of remote shards a node holds at a time: two windows of every lane that
    one of its data-parallel ranks reads. A smaller cache fetches chunks again and again."""
    remote = [dataset for dataset in datasets if not isinstance(dataset.storage, LocalStorage)]
    if not remote:
        return 0
    size = sum(row["bytes"] for dataset in remote for row in dataset.shards)
    chunk = size / sum(map(len, remote)) * BLOCK_SIZE
    of_a_rank = order.lanes // math.gcd(order.lanes, ranks)
    lanes = min(order.lanes, of_a_rank * min(ranks, ranks_on_node))
    return round(min(size, lanes * 2 * (SHUFFLE_BLOCK_SIZE // BLOCK_SIZE + 1) * chunk))


def _fetch(queue: SimpleQueue, datasets: Sequence[ShardedDataset]) -> None:
    while (chunk := queue.get()) is not None:
        source, shard, sample = chunk
        with suppress(StorageError, ShardError):
            datasets[source].prefetch(shard, sample)
    for dataset in datasets:
        dataset.close()
