"""Order of samples whose global batches have a fixed number of samples of every group of sources.

Every group has a shuffled order of its own. A global batch takes the next samples of each, group
after group, so what a sample index is stays a pure function of the seed and the index.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_owl2.data.sampling.keyed_random import combine
from megatron_owl2.data.sampling.shuffle import ShuffleOrder

_GROUP = 80  # keeps the keys of groups apart from others


class SampleGroup(NamedTuple):
    """Group of data sets, by number, with their weights, and its samples of a global batch."""

    name: str
    datasets: tuple[int, ...]
    weights: tuple[float, ...]
    per_batch: int


class GroupedOrder:
    """Order of an endless sequence of samples, as ShuffleOrder is one, batch by batch.

    The indices [b * B, (b + 1) * B), where B is the sum of all `per_batch`, are a global batch: its
    samples of the first group, then of the second, and so on. As data-parallel ranks take
    neighbouring indices in turn, all of them have samples of one group at a time. Epochs are of a
    group: it has every sample of its data sets, as often as their weights say, before it has any of
    its next epoch. A substitute for a sample is of its group.

    Raises ValueError for what ShuffleOrder refuses, which numbers the data sets within the group.
    """

    def __init__(
        self, shard_sizes: Sequence[Sequence[int]], groups: Sequence[SampleGroup], seed: int
    ):
        self._groups = groups
        self._orders: list[ShuffleOrder] = []
        for number, group in enumerate(groups):
            sizes = [shard_sizes[dataset] for dataset in group.datasets]
            key = combine(seed, _GROUP, number)
            try:
                self._orders.append(ShuffleOrder(sizes, group.weights, key))
            except ValueError as error:
                raise ValueError(f"group {group.name}: {error}") from None
        self._ends = np.cumsum([group.per_batch for group in groups])
        self.batch_size = int(self._ends[-1])

    def sample_at(self, sample_index: int, attempt: int = 0) -> tuple[int, int, int]:
        """(data set, shard, sample within the shard) of a sample index, or of its substitute."""
        number, index = self._place(sample_index)
        return self._of_run(number, self._orders[number].sample_at(index, attempt))

    def residue(self, rank: int, ranks: int) -> int:
        """The r with which data-parallel rank `rank` of `ranks` takes the indices s % ranks == r:
        its own number."""
        return rank

    def streams_of_nodes(self, ranks: int, ranks_per_node: int) -> list[int]:
        """The number of streams of all groups that the ranks of each node read."""
        nodes = [0] * -(-ranks // ranks_per_node)
        for end, group, order in zip(self._ends, self._groups, self._orders, strict=True):
            # Batch after batch a place of the group is in every distinct-th stream.
            distinct = math.gcd(group.per_batch, order.streams)
            index = np.arange(group.per_batch)
            node = (end - group.per_batch + index) % ranks // ranks_per_node
            for number in range(len(nodes)):
                read = np.unique(index[node == number] % distinct)
                nodes[number] += len(read) * order.streams // distinct
        return nodes

    def shuffle_block(self, sample_index: int) -> tuple[int, tuple[int, int], int]:
        """(epoch, (group, stream), number) of the shuffle block that a sample index is drawn
        from."""
        number, index = self._place(sample_index)
        epoch, stream, shuffle_block = self._orders[number].shuffle_block(index)
        return epoch, (number, stream), shuffle_block

    def next_shuffle_block(self, sample_index: int) -> int:
        """The first sample index of the next shuffle block of the same stream."""
        number, index = self._place(sample_index)
        per_batch = self._groups[number].per_batch
        batch, place = divmod(self._orders[number].next_shuffle_block(index), per_batch)
        return batch * self.batch_size + int(self._ends[number]) - per_batch + place

    def blocks(self, sample_index: int) -> list[tuple[int, int, int]]:
        """(data set, shard, a sample) of every block that the shuffle block of an index reads."""
        number, index = self._place(sample_index)
        return [self._of_run(number, block) for block in self._orders[number].blocks(index)]

    def _place(self, sample_index: int) -> tuple[int, int]:
        """The group of a sample index, and its index in that group's order."""
        batch, place = divmod(sample_index, self.batch_size)
        number = int(self._ends.searchsorted(place, side="right"))
        per_batch = self._groups[number].per_batch
        return number, batch * per_batch + place - (int(self._ends[number]) - per_batch)

    def _of_run(self, number: int, sample: tuple[int, int, int]) -> tuple[int, int, int]:
        """The sample with the number of its data set in the run instead of in its group."""
        dataset, shard, index = sample
        return self._groups[number].datasets[dataset], shard, index


SampleOrder = ShuffleOrder | GroupedOrder
