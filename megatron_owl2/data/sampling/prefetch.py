"""Prefetching of remote shards: the blocks that a process will read next, before it asks for them.

The order is known, so when a stream enters a shuffle block, the blocks that this one and the next
one read are queued. Only storage behind a network needs it.
"""

import os
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

from megatron_owl2.data.sampling.grouped_order import SampleOrder
from megatron_owl2.data.sampling.shuffle import BLOCK_SIZE, SHUFFLE_BLOCK_SIZE
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.storage import LocalStorage
from megatron_owl2.errors import ShardError, StorageError


class Prefetcher:
    """Prefetcher of the blocks behind the next samples, in a thread of the process that reads.

    The thread belongs to the process that asks first; it is a daemon, so that it never holds a
    process up, and it has data sets of its own, since those are not made for two threads. A fetch
    that fails here is tried again, and reported, when the sample is read.
    """

    def __init__(self, datasets: Sequence[ShardedDataset], order: SampleOrder):
        self._datasets, self._order = datasets, order
        self._remote = [not isinstance(d.storage, LocalStorage) for d in datasets]
        self._shuffle_blocks: dict[Hashable, tuple[int, int]] = {}  # by stream: epoch and number
        self._runtime = datasets[0].storage.runtime
        self._queue: Any = None
        self._copies: list[ShardedDataset] = []
        self._process = 0

    def advance_to(self, sample_index: int) -> None:
        """Queue what is needed from this sample index on."""
        if not any(self._remote):
            return
        if self._process != os.getpid():
            self._start()
        epoch, stream, shuffle_block = self._order.shuffle_block(sample_index)
        if self._shuffle_blocks.get(stream) == (epoch, shuffle_block):
            return
        self._shuffle_blocks[stream] = (epoch, shuffle_block)
        for first in (sample_index, self._order.next_shuffle_block(sample_index)):
            for source, shard, sample in self._order.blocks(first):
                if self._remote[source]:
                    self._queue.put((source, shard, sample))

    @property
    def retries(self) -> int:
        """Requests that this process had to repeat while prefetching."""
        return int(sum(copy.storage.counters["retries"] for copy in self._copies))

    def close(self) -> None:
        """End the thread after what it does; `advance_to` starts another."""
        if self._process == os.getpid():
            self._queue.put(None)
        self._process = 0

    def _start(self) -> None:
        self._process, self._shuffle_blocks = os.getpid(), {}
        self._queue = self._runtime.queue()
        self._copies = [dataset.reopened() for dataset in self._datasets]
        self._runtime.start_thread("prefetch", _fetch, self._queue, self._copies)

    def __getstate__(self) -> dict:
        return self.__dict__ | {
            "_queue": None,
            "_process": 0,
        }  # a queue cannot be sent to a process


def working_set(
    datasets: Sequence[ShardedDataset], order: SampleOrder, ranks: int, ranks_on_node: int
) -> int:
    """Bytes of remote shards, about, that a node holds at a time: two shuffle blocks of every
    stream that one of its data-parallel ranks reads. A smaller cache fetches blocks again and
    again."""
    remote = [dataset for dataset in datasets if not isinstance(dataset.storage, LocalStorage)]
    if not remote:
        return 0
    size = sum(row["bytes"] for dataset in remote for row in dataset.shards)
    block = size / sum(map(len, remote)) * BLOCK_SIZE
    streams = max(order.streams_of_nodes(ranks, ranks_on_node))
    return round(min(size, streams * 2 * (SHUFFLE_BLOCK_SIZE // BLOCK_SIZE + 1) * block))


def _fetch(queue: Any, datasets: Sequence[ShardedDataset]) -> None:
    while (block := queue.get()) is not None:
        source, shard, sample = block
        with suppress(StorageError, ShardError):
            datasets[source].prefetch(shard, sample)
    for dataset in datasets:
        dataset.close()
