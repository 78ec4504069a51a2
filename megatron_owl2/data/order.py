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

from megatron_owl2.data.hashing import combine, permutation

LANES, CHUNK, WINDOW = 256, 256, 4096  # another value makes another order
MAX_CHUNKS = 2**26
_EPOCH, _WINDOW, _MIXTURE, _SUBSTITUTE = range(4)  # what a key is for


class Order:
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
        lanes: int = LANES,
        chunk: int = CHUNK,
        window: int = WINDOW,
    ):
        if not shard_sizes or len(shard_sizes) != len(weights):
            raise ValueError("give at least one data set and one weight for each")
        if min(weights) <= 0:
            raise ValueError(f"weights must be positive, not {list(weights)}")
        if min(lanes, chunk, window) < 1:
            raise ValueError("lanes, chunk and window must be positive")
        self.seed = seed
        self._window = window
        copies = _mixture([sum(sizes) for sizes in shard_sizes], weights, chunk)
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
        self._epoch_cache: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window_cache: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # one per lane

    def locate(self, slot: int, attempt: int = 0) -> tuple[int, int, int]:
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

    def chunks(self, slot: int, ahead: int = 0) -> list[tuple[int, int, int]]:
        """(data set, shard, a sample) of every chunk that a slot's window reads.

        `ahead` asks for the windows after it of the same lane; there is none after the last one of
        an epoch.
        """
        place = self._place(slot)
        start = place.start + ahead * self._window
        number = place.window + ahead
        if ahead and number >= place.windows:
            return []
        stop = place.lane_stop if number == place.windows - 1 else start + self._window
        _, chunks, ends = self._permuted(place.epoch)
        first, last = ends.searchsorted([start, stop - 1], side="right").tolist()
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
            windows=windows,
            start=lane_start + begin,
            length=length,
            index=number - begin,
            lane_stop=lane_start + lane_length,
        )

    def _sample(self, epoch: int, position: int) -> tuple[int, int, int]:
        """The sample at a position of the epoch's sequence of permuted chunks."""
        _, chunks, ends = self._permuted(epoch)
        index = int(ends.searchsorted(position, side="right"))
        chunk = chunks[index]
        offset = position - (int(ends[index - 1]) if index else 0)
        return int(self._dataset[chunk]), int(self._shard[chunk]), int(self._start[chunk]) + offset

    def _permuted(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The epoch, its order of the chunks and where each of them ends in its sequence."""
        if self._epoch_cache is None or self._epoch_cache[0] != epoch:
            chunks = permutation(len(self._count), combine(self.seed, _EPOCH, epoch))
            ends = np.cumsum(self._count[chunks], dtype=np.int64)
            self._epoch_cache = (epoch, chunks, ends)
        return self._epoch_cache

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
    windows: int  # of the lane
    start: int
    length: int
    index: int  # of the slot among the window's
    lane_stop: int


def _mixture(samples: list[int], weights: Sequence[float], chunk: int) -> list[int]:
    """How many samples of each data set one epoch holds; at least all of it."""
    if min(samples) < 1:
        raise ValueError(f"data set {samples.index(min(samples))} is empty")
    shares = [weight / sum(weights) for weight in weights]
    needs = [count / share for count, share in zip(samples, shares, strict=True)]
    length = max(needs)
    if length / chunk > MAX_CHUNKS:
        largest = needs.index(length)
        raise ValueError(
            f"data set {largest} has {samples[largest]} samples but only {shares[largest]:.2g} of "
            f"the mixture, so one epoch would take {length:.2g} slots; raise its weight"
        )
    return [max(count, round(share * length)) for count, share in zip(samples, shares, strict=True)]


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
