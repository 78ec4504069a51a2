"""Order of packed rows over the shuffled order of samples.

The samples of an epoch come in their shuffled order; windows of them are packed into rows, and the
rows of a window are shuffled. So the order is a pure function of the seed, the lengths and the row
index, which is the only state of a run, and every sample of an epoch is in exactly one row of it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_128_hexdigest

from megatron_owl2.data.lengths import SampleLengths
from megatron_owl2.data.sampling.keyed_random import combine, permutation
from megatron_owl2.data.sampling.packing import pack
from megatron_owl2.data.sampling.shuffle import ShuffleOrder

WINDOW = 8192  # samples that are packed together; another value makes another order
_ROWS = 64  # keeps the keys of rows apart from others
_GROUPS = 4  # of rows that are kept sorted


@dataclass(frozen=True)
class Packing:
    """Packing of several samples into a row: the samples' lengths, by data set, and the limits of a
    row.

    A sample takes `tokens_per_image` positions for each image. One beyond `row_length` positions or
    `images_per_row` images is taken as if it had just these: training shortens it, or leaves it out
    if no answer fits. `group` is the number of rows that are balanced over the ranks in a phase
    that begins now.
    """

    lengths: Sequence[SampleLengths]
    tokens_per_image: int
    row_length: int
    images_per_row: int
    group: int

    def demand(self, dataset: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions and images, int64 [n] each, that samples of a data set take in their rows."""
        of = self.lengths[dataset]
        text, images = of.text[index].astype(np.int64), of.images[index].astype(np.int64)
        positions = np.clip(text + images * self.tokens_per_image, 1, self.row_length)
        return positions, np.minimum(images, self.images_per_row)

    @property
    def oversized(self) -> int:
        """Number of samples that have more positions or images than a row."""
        count = 0
        for of in self.lengths:
            images = of.images.astype(np.int64)
            positions = of.text + images * self.tokens_per_image
            beyond = (positions > self.row_length) | (images > self.images_per_row)
            count += int(np.count_nonzero(beyond))
        return count

    @property
    def identity(self) -> list:
        """Everything that decides which samples a row holds, but for the order of a group."""
        tables = [table.tobytes() for of in self.lengths for table in (of.text, of.images)]
        digests = [xxh3_128_hexdigest(table) for table in tables]
        limits = self.tokens_per_image, self.row_length, self.images_per_row, WINDOW
        return [*limits, *digests]


class RowSpec(NamedTuple):
    """Packed row before its samples are read: their indices in the order of samples, and what they
    add up to."""

    sample_indices: tuple[int, ...]
    positions: int
    images: int


class PackedOrder:
    """Packed rows of an endless sequence, as `order` has the samples.

    `shard_sizes` are those that `order` was made with. Of every `group` rows from the first on
    those with most images come first: as data-parallel ranks take neighbouring rows in turn, they
    get about as many images in each micro-batch. `epochs` ends the sequence after so many: rows
    behind are empty; None never ends.
    """

    def __init__(
        self,
        order: ShuffleOrder,
        packing: Packing,
        shard_sizes: Sequence[Sequence[int]],
        group: int,
        epochs: int | None = None,
    ):
        self.order, self.packing = order, packing
        self._shard_starts = [np.cumsum([0, *sizes[:-1]], dtype=np.int64) for sizes in shard_sizes]
        self._group, self._epochs = group, epochs
        self._plans: list[_EpochPlan] = []  # of the epochs from the first on
        self._starts = [0]  # first row of each
        self._sorted = lru_cache(_GROUPS)(self._sort)

    def rows_before(self, epoch: int) -> int:
        """Number of rows of all epochs before this one, which is their plan."""
        while len(self._starts) <= epoch:
            plan = self._plan(len(self._plans))
            self._plans.append(plan)
            self._starts.append(self._starts[-1] + len(plan.positions))
        return self._starts[epoch]

    def row(self, row_index: int) -> RowSpec:
        """The row of an index; without samples behind the last epoch."""
        group, place = divmod(row_index, self._group)
        return self._sorted(group)[place]

    def fill(self, epoch: int = 0) -> float:
        """Share of the positions of an epoch's rows that samples fill."""
        self.rows_before(epoch + 1)
        positions = self._plans[epoch].positions
        return float(positions.sum() / (len(positions) * self.packing.row_length))

    @property
    def nbytes(self) -> int:
        """Bytes of the plans so far, of which a run keeps one for each epoch."""
        return sum(table.nbytes for plan in self._plans for table in plan)

    def describe(self) -> str:
        """The rows of the first epoch, for the log."""
        samples, rows = self.order.samples_per_epoch, self.rows_before(1)
        images, oversized = int(self._plans[0].images.sum()), self.packing.oversized
        more = f"; {oversized:,} have more than a row, and lose turns" if oversized else ""
        return (
            f"packing: {samples:,} samples with {images:,} images in {rows:,} rows of "
            f"{self.packing.row_length} positions, {self.fill():.1%} filled, "
            f"{samples / rows:.2f} samples a row{more}"
        )

    def _sort(self, group: int) -> list[RowSpec]:
        first = group * self._group
        rows = [self._unsorted(index) for index in range(first, first + self._group)]
        return sorted(rows, key=lambda row: (-row.images, -row.positions))

    def _unsorted(self, row_index: int) -> RowSpec:
        for epoch in itertools.count():
            if self._epochs is not None and epoch == self._epochs:
                return RowSpec((), 0, 0)
            if row_index < self.rows_before(epoch + 1):
                return self._plans[epoch].row(row_index - self._starts[epoch])
        raise AssertionError("counting has no end")

    def _plan(self, epoch: int) -> "_EpochPlan":
        limits = self.packing
        positions, images = self._demand(*self.order.epoch_samples(epoch))
        first = epoch * self.order.samples_per_epoch
        members, ends = [], []
        for start in range(0, len(positions), WINDOW):
            window = slice(start, start + WINDOW)
            rows = pack(positions[window], images[window], limits.row_length, limits.images_per_row)
            key = combine(self.order.seed, _ROWS, first + start)
            shuffled = [rows[index] for index in permutation(len(rows), key).tolist()]
            members.append(np.fromiter(itertools.chain.from_iterable(shuffled), np.int64) + start)
            ends += map(len, shuffled)
        chosen = np.concatenate(members)
        stops = np.cumsum(ends)
        return _EpochPlan(
            chosen + first,
            stops,
            _sums(positions[chosen], stops),
            _sums(images[chosen], stops),
        )

    def _demand(
        self, dataset: np.ndarray, shard: np.ndarray, sample: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions and images of samples, int64 [n] each."""
        positions, images = np.empty_like(sample), np.empty_like(sample)
        for number, starts in enumerate(self._shard_starts):
            mine = np.flatnonzero(dataset == number)
            index = starts[shard[mine]] + sample[mine]
            positions[mine], images[mine] = self.packing.demand(number, index)
        return positions, images


class _EpochPlan(NamedTuple):
    """Rows of an epoch: the sample indices, row after row, where each row ends in them, and the
    positions and images of each."""

    samples: np.ndarray
    stops: np.ndarray
    positions: np.ndarray
    images: np.ndarray

    def row(self, number: int) -> RowSpec:
        start = self.stops[number - 1] if number else 0
        samples = self.samples[start : self.stops[number]].tolist()
        return RowSpec(tuple(samples), int(self.positions[number]), int(self.images[number]))


def _sums(values: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Sums of the runs of values that end at `stops`."""
    totals = np.cumsum(values)[stops - 1]
    return np.diff(totals, prepend=0)
