"""Shuffled order of training samples over all data sets, without an index in memory or on disk.

The order maps a global sample index to (data set, shard, sample) as a pure function of the seed, so
the sample index is the only state: each of R data-parallel ranks takes the indices s of one s % R,
and resuming, another number of ranks or workers and skipping ahead are all one integer.

Every shard is cut into blocks of neighbouring samples. In epoch e the blocks are permuted; the
permuted sequence is divided into streams that advance side by side, and each stream is shuffled
inside of shuffle blocks. Neighbouring indices belong to different streams, and a stream reads few
blocks at a time.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_owl2.data.sampling.keyed_random import combine, permutation

STREAMS, BLOCK_SIZE, SHUFFLE_BLOCK_SIZE = 256, 256, 4096  # another value makes another order
MAX_BLOCKS = 2**24  # 4 billion samples in full blocks; 0.8 GB in every process
_EPOCH, _SHUFFLE, _MIXTURE, _SUBSTITUTE = range(4)  # what a key is for


class ShuffleOrder:
    """Shuffled order of an endless sequence of samples from several data sets.

    `shard_sizes[d]` are the sample counts of data set d's shards, `weights[d]` its share of the
    sequence in any unit. One epoch is as long as it must be for every data set to be seen once
    without breaking the shares: T = max_d samples_d / share_d. The data set that sets T is
    seen exactly once in an epoch, the others share_d * T / samples_d >= 1 times: whole copies, and
    the rest from its blocks in hash order. The shares are exact to half a sample per epoch.

    The indices [e * samples_per_epoch, (e + 1) * samples_per_epoch) hold every sample of epoch e
    exactly as often as the mixture says. A data set too small for `streams` streams of one shuffle
    block each has fewer, down to one stream with one shuffle block: a full shuffle. A stream's last
    shuffle block takes the remainder, so that none is short.

    Raises ValueError if a data set is empty, a weight is not positive, or the shares would repeat
    small data sets so often that the table of blocks does not fit into memory.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int]],
        weights: Sequence[float],
        seed: int,
        streams: int = STREAMS,
        block: int = BLOCK_SIZE,
        shuffle_block: int = SHUFFLE_BLOCK_SIZE,
    ):
        if not shard_sizes or len(shard_sizes) != len(weights):
            raise ValueError("give at least one data set and one weight for each")
        if min(weights) <= 0:
            raise ValueError(f"weights must be positive, not {list(weights)}")
        if min(streams, block, shuffle_block) < 1:
            raise ValueError("streams, block and shuffle block must be positive")
        self.seed = seed
        self._shuffle_block_size = shuffle_block
        copies = _mixture([sum(sizes) for sizes in shard_sizes], weights)
        _check_table(shard_sizes, copies, block)
        tables = [
            _repeat(_blocks(np.asarray(sizes), block), samples, combine(seed, _MIXTURE, index))
            for index, (sizes, samples) in enumerate(zip(shard_sizes, copies, strict=True))
        ]
        self._dataset = np.repeat(
            np.arange(len(tables), dtype=np.int32), [len(table[0]) for table in tables]
        )
        self._shard, self._start, self._count = (
            np.concatenate([table[part] for table in tables]) for part in range(3)
        )
        self.dataset_samples_per_epoch: list[int] = copies
        self.samples_per_epoch = sum(copies)
        self.streams = max(1, min(streams, self.samples_per_epoch // shuffle_block))
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # the last two
        self._shuffled_cache: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # one per stream

    def sample_at(self, sample_index: int, attempt: int = 0) -> tuple[int, int, int]:
        """(data set, shard, sample within the shard) of a sample index.

        `attempt` k > 0 names the k-th substitute for a sample that cannot be used: another one of
        the same shuffle block, the same on every rank and in every run.
        """
        place = self._place(sample_index)
        index = place.index
        if attempt and place.length > 1:
            key = combine(self.seed, _SUBSTITUTE, sample_index, attempt)
            index = (index + 1 + key % (place.length - 1)) % place.length
        return self._sample(place.epoch, place.start + int(self._shuffled(place)[index]))

    def residue(self, rank: int, ranks: int) -> int:
        """The r with which data-parallel rank `rank` of `ranks` takes the indices s % ranks == r.

        Ranks that share streams are neighbours, mostly on one node, which then fetches a block once
        for all of them. Where `ranks` divides the number of streams no rank shares, and r is
        `rank`.
        """
        distinct = math.gcd(ranks, self.streams)
        neighbours = ranks // distinct
        return rank % neighbours * distinct + rank // neighbours

    def streams_of_nodes(self, ranks: int, ranks_per_node: int) -> list[int]:
        """The number of streams that the ranks of each node read."""
        distinct = math.gcd(ranks, self.streams)
        shares = [self.residue(rank, ranks) % distinct for rank in range(ranks)]
        nodes = (shares[n : n + ranks_per_node] for n in range(0, ranks, ranks_per_node))
        return [len(set(node)) * self.streams // distinct for node in nodes]

    def shuffle_block(self, sample_index: int) -> tuple[int, int, int]:
        """(epoch, stream, number) of the shuffle block that a sample index is drawn from."""
        place = self._place(sample_index)
        return place.epoch, place.stream, place.shuffle_block

    def next_shuffle_block(self, sample_index: int) -> int:
        """The first sample index of the next shuffle block of the same stream."""
        place = self._place(sample_index)
        if place.last:
            return (place.epoch + 1) * self.samples_per_epoch + place.stream
        return sample_index + (place.length - place.index) * self.streams

    def shuffle_block_samples(self, sample_index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(data set, shard, sample), int64 [n] each, of all indices of the shuffle block of one,
        in their order: what `sample_at` gives, one after the other and slower."""
        place = self._place(sample_index)
        blocks, ends = self._permuted(place.epoch)
        positions = place.start + self._shuffled(place).astype(np.int64)
        first, last = ends.searchsorted([place.start, place.start + place.length - 1], side="right")
        number = first + ends[first : last + 1].searchsorted(positions, side="right")
        block = blocks[number]
        offset = positions - (ends[number] - self._count[block])
        return (
            self._dataset[block].astype(np.int64),
            self._shard[block].astype(np.int64),
            self._start[block] + offset,
        )

    def epoch_samples(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(data set, shard, sample), int64 [samples_per_epoch] each, of all indices of an epoch in
        their order."""
        total = self.samples_per_epoch
        found = np.empty((3, total), dtype=np.int64)
        for stream in range(self.streams):
            place = stream
            while place < total:
                start = epoch * total + place
                samples = self.shuffle_block_samples(start)
                stop = place + len(samples[0]) * self.streams
                for whole, part in zip(found, samples, strict=True):
                    whole[place : min(stop, total) : self.streams] = part
                place = stop
        return found[0], found[1], found[2]

    def blocks(self, sample_index: int) -> list[tuple[int, int, int]]:
        """(data set, shard, a sample) of every block that the shuffle block of an index reads."""
        place = self._place(sample_index)
        blocks, ends = self._permuted(place.epoch)
        around = [place.start, place.start + place.length - 1]
        first, last = ends.searchsorted(around, side="right").tolist()
        return [
            (int(self._dataset[c]), int(self._shard[c]), int(self._start[c]))
            for c in blocks[first : last + 1]
        ]

    def _place(self, sample_index: int) -> "_Place":
        epoch, position = divmod(sample_index, self.samples_per_epoch)
        number, stream = divmod(position, self.streams)
        base, extra = divmod(self.samples_per_epoch, self.streams)
        stream_start = stream * base + min(stream, extra)
        stream_length = base + (stream < extra)
        shuffle_blocks = max(1, stream_length // self._shuffle_block_size)
        shuffle_block = min(number // self._shuffle_block_size, shuffle_blocks - 1)
        begin = shuffle_block * self._shuffle_block_size
        length = (
            self._shuffle_block_size
            if shuffle_block < shuffle_blocks - 1
            else stream_length - begin
        )
        return _Place(
            epoch=epoch,
            stream=stream,
            shuffle_block=shuffle_block,
            last=shuffle_block == shuffle_blocks - 1,
            start=stream_start + begin,
            length=length,
            index=number - begin,
        )

    def _sample(self, epoch: int, position: int) -> tuple[int, int, int]:
        """The sample at a position of the epoch's sequence of permuted blocks."""
        blocks, ends = self._permuted(epoch)
        index = int(ends.searchsorted(position, side="right"))
        block = blocks[index]
        offset = position - (int(ends[index - 1]) if index else 0)
        return int(self._dataset[block]), int(self._shard[block]), int(self._start[block]) + offset

    def _permuted(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's order of the blocks and where each of them ends in its sequence."""
        if epoch not in self._epochs:
            if len(self._epochs) == 2:  # where one ends, the next is looked ahead at
                del self._epochs[min(self._epochs)]
            blocks = permutation(len(self._count), combine(self.seed, _EPOCH, epoch))
            blocks = blocks.astype(np.int32)
            self._epochs[epoch] = (blocks, np.cumsum(self._count[blocks], dtype=np.int64))
        return self._epochs[epoch]

    def _shuffled(self, place: "_Place") -> np.ndarray:
        identity = (place.epoch, place.shuffle_block)
        cached = self._shuffled_cache.get(place.stream)
        if cached is None or cached[0] != identity:
            key = combine(self.seed, _SHUFFLE, place.epoch, place.stream, place.shuffle_block)
            order = permutation(place.length, key).astype(np.int32)
            cached = self._shuffled_cache[place.stream] = (identity, order)
        return cached[1]


class _Place(NamedTuple):
    """Place of a sample index: in the shuffle block [start, start + length) of the epoch."""

    epoch: int
    stream: int
    shuffle_block: int
    last: bool  # of the stream's shuffle blocks
    start: int
    length: int
    index: int  # of the sample within the shuffle block


def _mixture(samples: list[int], weights: Sequence[float]) -> list[int]:
    """Number of samples of each data set in one epoch; at least all of it."""
    if min(samples) < 1:
        raise ValueError(f"data set {samples.index(min(samples))} is empty")
    shares = [weight / sum(weights) for weight in weights]
    needs = [count / share for count, share in zip(samples, shares, strict=True)]
    length = max(needs)
    return [max(count, round(share * length)) for count, share in zip(samples, shares, strict=True)]


def _check_table(shard_sizes: Sequence[Sequence[int]], copies: list[int], block: int) -> None:
    """Refuse a mixture that repeats data sets until the table of blocks fills the memory."""
    needed = [
        copy / sum(sizes) * int(np.ceil(np.asarray(sizes) / block).sum())
        for sizes, copy in zip(shard_sizes, copies, strict=True)
    ]
    if sum(needed) > MAX_BLOCKS:
        most = needed.index(max(needed))
        samples = sum(shard_sizes[most])
        raise ValueError(
            f"data set {most} of {samples} samples in {len(shard_sizes[most])} shards would come "
            f"{copies[most] / samples:.3g} times in one epoch, as {needed[most]:.2g} pieces; lower "
            "its weight, raise that of the largest data set, or write it in fewer shards"
        )


def _blocks(sizes: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shard, first sample and number of samples of every block, int32 each."""
    per_shard = -(-sizes // block)
    shard = np.repeat(np.arange(len(sizes)), per_shard)
    first = np.cumsum(per_shard) - per_shard
    start = (np.arange(len(shard)) - first[shard]) * block
    count = np.minimum(block, sizes[shard] - start)
    return shard.astype(np.int32), start.astype(np.int32), count.astype(np.int32)


def _repeat(
    blocks: tuple[np.ndarray, np.ndarray, np.ndarray], samples: int, key: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The blocks again and again until they hold `samples` samples; the last block is cut."""
    shard, start, count = blocks
    copies, rest = divmod(samples, int(count.sum()))
    if (copies, rest) == (1, 0):
        return blocks
    some = permutation(len(count), key)
    ends = np.cumsum(count[some], dtype=np.int64)
    some = some[: int(ends.searchsorted(rest)) + 1] if rest else some[:0]
    part = count[some]
    if rest:
        part[-1] -= ends[len(some) - 1] - rest
    return (
        np.concatenate([np.tile(shard, copies), shard[some]]),
        np.concatenate([np.tile(start, copies), start[some]]),
        np.concatenate([np.tile(count, copies), part]),
    )
