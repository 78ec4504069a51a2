"""The order of training: global slot -> (data set, shard, sample), a pure function of the seed.

The slot is the only state. Data-parallel rank r of R takes the slots s with s % R == r, so
resuming, another number of ranks or workers and skipping ahead are all one integer.

Every shard is cut into chunks of neighbouring samples. In epoch e the chunks are permuted; the
permuted sequence is divided into lanes that advance side by side, and each lane shuffles inside
windows. Neighbouring slots come from different lanes, a lane reads few chunks at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_owl2.data.sampling.keyed_random import combine, permutation

STREAMS, BLOCK_SIZE, SHUFFLE_BLOCK_SIZE = 256, 256, 4096  # another value makes another order
MAX_CHUNKS = 2**24  # 4 billion samples in full chunks; 0.8 GB in every process
_EPOCH, _WINDOW, _MIXTURE, _SUBSTITUTE = range(4)  # what a key is for


class ShuffleOrder:
    """The order of an endless stream over several data sets.

    `shard_sizes[d]` are the sample counts of data set d's shards, `weights[d]` its share of the
    slots in any unit. One epoch is as long as it must be for every data set to be seen once
    without breaking the shares: T = max_d samples_d / share_d slots. The data set that sets T is
    seen exactly once in an epoch, the others share_d * T / samples_d >= 1 times: whole copies, and
    the rest from its chunks in hash order. The shares are exact to half a sample per epoch.

    Slots [e * slots_per_epoch, (e + 1) * slots_per_epoch) hold every sample of epoch e exactly as
    often as the mixture says. A data set too small for `lanes` lanes of one window each has fewer,
    down to one lane with one window: a full shuffle. A lane's last window takes the remainder, so
    that no window is short.

    Raises ValueError if a data set is empty, a weight is not positive, or the shares would repeat
    small data sets so often that the table of chunks does not fit into memory.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int]],
        weights: Sequence[float],
        seed: int,
        lanes: int = STREAMS,
        chunk: int = BLOCK_SIZE,
        window: int = SHUFFLE_BLOCK_SIZE,
    ):
        if not shard_sizes or len(shard_sizes) != len(weights):
            raise ValueError("give at least one data set and one weight for each")
        if min(weights) <= 0:
            raise ValueError(f"weights must be positive, not {list(weights)}")
        if min(lanes, chunk, window) < 1:
            raise ValueError("lanes, chunk and window must be positive")
        self.seed = seed
        self._window = window
        copies = _mixture([sum(sizes) for sizes in shard_sizes], weights)
        _check_table(shard_sizes, copies, chunk)
        tables = [
            _repeat(_chunks(np.asarray(sizes), chunk), samples, combine(seed, _MIXTURE, index))
            for index, (sizes, samples) in enumerate(zip(shard_sizes, copies, strict=True))
        ]
        self._dataset = np.repeat(
            np.arange(len(tables), dtype=np.int32), [len(table[0]) for table in tables]
        )
        self._shard, self._start, self._count = (
            np.concatenate([table[part] for table in tables]) for part in range(3)
        )
        self.samples_per_epoch: list[int] = copies
        self.slots_per_epoch = sum(copies)
        self.lanes = max(1, min(lanes, self.slots_per_epoch // window))
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # the last two
        self._window_cache: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # one per lane

    def sample_at(self, slot: int, attempt: int = 0) -> tuple[int, int, int]:
        """(data set, shard, sample) of a slot.

        `attempt` k > 0 names the k-th substitute for a slot whose sample cannot be used: another
        position of the same window, the same on every rank and in every run.
        """
        place = self._place(slot)
        index = place.index
        if attempt and place.length > 1:
            key = combine(self.seed, _SUBSTITUTE, slot, attempt)
            index = (index + 1 + key % (place.length - 1)) % place.length
        return self._sample(place.epoch, place.start + int(self._window_order(place)[index]))

    def window(self, slot: int) -> tuple[int, int, int]:
        """(epoch, lane, number) of the window that a slot is drawn from."""
        place = self._place(slot)
        return place.epoch, place.lane, place.window

    def next_window(self, slot: int) -> int:
        """The first slot of the window after a slot's, in the same lane."""
        place = self._place(slot)
        if place.last:
            return (place.epoch + 1) * self.slots_per_epoch + place.lane
        return slot + (place.length - place.index) * self.lanes

    def chunks(self, slot: int) -> list[tuple[int, int, int]]:
        """(data set, shard, a sample) of every chunk that a slot's window reads."""
        place = self._place(slot)
        chunks, ends = self._permuted(place.epoch)
        around = [place.start, place.start + place.length - 1]
        first, last = ends.searchsorted(around, side="right").tolist()
        return [
            (int(self._dataset[c]), int(self._shard[c]), int(self._start[c]))
            for c in chunks[first : last + 1]
        ]

    def _place(self, slot: int) -> "_Place":
        epoch, position = divmod(slot, self.slots_per_epoch)
        number, lane = divmod(position, self.lanes)
        base, extra = divmod(self.slots_per_epoch, self.lanes)
        lane_start = lane * base + min(lane, extra)
        lane_length = base + (lane < extra)
        windows = max(1, lane_length // self._window)
        window = min(number // self._window, windows - 1)
        begin = window * self._window
        length = self._window if window < windows - 1 else lane_length - begin
        return _Place(
            epoch=epoch,
            lane=lane,
            window=window,
            last=window == windows - 1,
            start=lane_start + begin,
            length=length,
            index=number - begin,
        )

    def _sample(self, epoch: int, position: int) -> tuple[int, int, int]:
        """The sample at a position of the epoch's sequence of permuted chunks."""
        chunks, ends = self._permuted(epoch)
        index = int(ends.searchsorted(position, side="right"))
        chunk = chunks[index]
        offset = position - (int(ends[index - 1]) if index else 0)
        return int(self._dataset[chunk]), int(self._shard[chunk]), int(self._start[chunk]) + offset

    def _permuted(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's order of the chunks and where each of them ends in its sequence."""
        if epoch not in self._epochs:
            if len(self._epochs) == 2:  # where one ends, the next is looked ahead at
                del self._epochs[min(self._epochs)]
            chunks = permutation(len(self._count), combine(self.seed, _EPOCH, epoch))
            chunks = chunks.astype(np.int32)
            self._epochs[epoch] = (chunks, np.cumsum(self._count[chunks], dtype=np.int64))
        return self._epochs[epoch]

    def _window_order(self, place: "_Place") -> np.ndarray:
        identity = (place.epoch, place.window)
        cached = self._window_cache.get(place.lane)
        if cached is None or cached[0] != identity:
            key = combine(self.seed, _WINDOW, place.epoch, place.lane, place.window)
            order = permutation(place.length, key).astype(np.int32)
            cached = self._window_cache[place.lane] = (identity, order)
        return cached[1]


class _Place(NamedTuple):
    """Where a slot is drawn from: the window [start, start + length) of the epoch's sequence."""

    epoch: int
    lane: int
    window: int
    last: bool  # of the lane's windows
    start: int
    length: int
    index: int  # of the slot among the window's


def _mixture(samples: list[int], weights: Sequence[float]) -> list[int]:
    """How many samples of each data set one epoch holds; at least all of it."""
    if min(samples) < 1:
        raise ValueError(f"data set {samples.index(min(samples))} is empty")
    shares = [weight / sum(weights) for weight in weights]
    needs = [count / share for count, share in zip(samples, shares, strict=True)]
    length = max(needs)
    return [max(count, round(share * length)) for count, share in zip(samples, shares, strict=True)]


def _check_table(shard_sizes: Sequence[Sequence[int]], copies: list[int], chunk: int) -> None:
    """Refuse a mixture that repeats data sets until the table of chunks fills the memory."""
    needed = [
        copy / sum(sizes) * int(np.ceil(np.asarray(sizes) / chunk).sum())
        for sizes, copy in zip(shard_sizes, copies, strict=True)
    ]
    if sum(needed) > MAX_CHUNKS:
        most = needed.index(max(needed))
        samples = sum(shard_sizes[most])
        raise ValueError(
            f"data set {most} of {samples} samples in {len(shard_sizes[most])} shards would come "
            f"{copies[most] / samples:.3g} times in one epoch, as {needed[most]:.2g} pieces; lower "
            "its weight, raise that of the largest data set, or write it in fewer shards"
        )


def _chunks(sizes: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shard, first sample and number of samples of every chunk, int32 each."""
    per_shard = -(-sizes // chunk)
    shard = np.repeat(np.arange(len(sizes)), per_shard)
    first = np.cumsum(per_shard) - per_shard
    start = (np.arange(len(shard)) - first[shard]) * chunk
    count = np.minimum(chunk, sizes[shard] - start)
    return shard.astype(np.int32), start.astype(np.int32), count.astype(np.int32)


def _repeat(
    chunks: tuple[np.ndarray, ...], samples: int, key: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The chunks again and again until they hold `samples` samples; the last chunk is cut."""
    shard, start, count = chunks
    copies, rest = divmod(samples, int(count.sum()))
    if (copies, rest) == (1, 0):
        return chunks
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
