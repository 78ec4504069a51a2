"""Packing: rows within their limits, every sample once, full rows, balanced ranks."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_owl2.data.lengths import SampleLengths
from megatron_owl2.data.sampling.packed_order import PackedOrder, Packing
from megatron_owl2.data.sampling.packing import pack
from megatron_owl2.data.sampling.shuffle import ShuffleOrder

samples = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), max_size=60)


def arrays(pairs) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@settings(max_examples=100)
@given(samples)
def test_every_sample_is_in_one_row_and_rows_keep_their_limits(pairs):
    lengths, images = arrays(pairs)
    rows = pack(lengths, images, 50, 4)
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(pairs)))
    for row in rows:
        assert row and lengths[row].sum() <= 50 and images[row].sum() <= 4
    assert rows == pack(lengths, images, 50, 4)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=60))
def test_no_two_rows_fit_into_one(lengths):
    rows = pack(*arrays([(length, 0) for length in lengths]), 50, 4)
    least = sorted(sum(lengths[index] for index in row) for row in rows)[:2]
    assert len(rows) == 1 or sum(least) > 50


def test_a_sample_goes_into_the_fullest_row_that_takes_it():
    assert pack(*arrays([(30, 0), (40, 0), (10, 0), (20, 0)]), 50, 4) == [[1, 2], [0, 3]]
    assert pack(*arrays([(40, 2), (30, 0), (10, 1)]), 50, 2) == [[0], [1, 2]]  # images decide


def test_a_sample_beyond_the_limits_is_refused():
    with pytest.raises(ValueError, match="51 positions or 0 images"):
        pack(*arrays([(51, 0)]), 50, 4)
    with pytest.raises(ValueError, match="5 images"):
        pack(*arrays([(1, 5)]), 50, 4)


def test_samples_with_more_than_a_row_are_told():
    lengths = SampleLengths(*np.array([[10, 60, 10, 10], [0, 0, 4, 3]], dtype=np.int32))
    limits = Packing([lengths], tokens_per_image=5, row_length=50, images_per_row=3, group=2)
    assert limits.oversized == 2
    order = PackedOrder(ShuffleOrder([[4]], [1.0], seed=1), limits, [[4]], 2)
    assert order.describe().endswith("; 2 have more than a row, and lose turns")


SIZES = [[37, 64, 99], [100]]


def packing(group: int = 8, images_per_row: int = 3) -> Packing:
    random = np.random.default_rng(0)
    lengths = [
        SampleLengths(
            random.integers(5, 40, sum(sizes)).astype(np.int32),
            random.integers(0, 3, sum(sizes)).astype(np.int32),
        )
        for sizes in SIZES
    ]
    return Packing(lengths, 5, 60, images_per_row, group)


def order(epochs: int | None = None, seed: int = 3, **options) -> PackedOrder:
    samples = ShuffleOrder(SIZES, [200, 100], seed)
    chosen = packing(**options)
    return PackedOrder(samples, chosen, SIZES, chosen.group, epochs)


def test_an_epoch_has_every_sample_once_and_the_next_another_order():
    rows = order()
    first, second = rows.rows_before(1), rows.rows_before(2)
    # Groups are sorted across the border of epochs, so rows are looked at in whole groups.
    end = -(-second // 8) * 8
    found = [rows.row(index).sample_indices for index in range(end)]
    counts = Counter(itertools.chain.from_iterable(found))
    assert set(counts.values()) == {1} and set(range(600)) <= set(counts)
    assert first != 0 and found[: first // 2] != found[first : first + first // 2]


def test_rows_say_what_their_samples_take():
    rows, chosen = order(), packing()
    for index in range(rows.rows_before(1)):
        row = rows.row(index)
        places = [rows.order.sample_at(sample) for sample in row.sample_indices]
        positions = images = 0
        for dataset, shard, sample in places:
            at = sum(SIZES[dataset][:shard]) + sample
            count = min(int(chosen.lengths[dataset].images[at]), 3)
            images += count
            text = int(chosen.lengths[dataset].text[at])
            positions += min(text + 5 * int(chosen.lengths[dataset].images[at]), 60)
        assert (row.positions, row.images) == (positions, images)
        assert positions <= 60 and images <= 3


def test_behind_the_last_epoch_rows_are_empty():
    rows = order(epochs=2)
    total = rows.rows_before(2)
    found = [rows.row(index) for index in range(total + 20)]
    assert sum(bool(row.sample_indices) for row in found) == total
    assert Counter(i for row in found for i in row.sample_indices) == Counter(range(600))
    assert all(row == ((), 0, 0) for row in found[-12:])


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_get_nearly_as_many_images_in_every_step(ranks):
    """The spread of a step is that of a row, however many rows a rank has in it."""
    rows = order(group=32)
    unsorted = order(group=1)
    found, before = [], []
    for step in range(3):
        for spreads, which in ((found, rows), (before, unsorted)):
            shares = [
                sum(which.row(32 * step + place).images for place in range(rank, 32, ranks))
                for rank in range(ranks)
            ]
            spreads.append(max(shares) - min(shares))
    assert max(found) <= 3 < max(before)
    for step in range(3):  # and the same rows make the step
        batch = {row.sample_indices for row in map(rows.row, range(32 * step, 32 * step + 32))}
        other = map(unsorted.row, range(32 * step, 32 * step + 32))
        assert batch == {row.sample_indices for row in other}


def test_the_identity_changes_with_what_decides_the_rows():
    one, two = packing().identity, packing(images_per_row=4).identity
    assert one == packing(group=16).identity != two
    other = packing()
    other.lengths[1].text[5] += 1
    assert other.identity != one


def test_an_epoch_of_samples_is_what_single_ones_are():
    samples = ShuffleOrder([[900, 77], [1300]], [1, 1], 5, streams=4, block=16, shuffle_block=64)
    for epoch in (0, 1, 3):
        start = epoch * samples.samples_per_epoch
        expected = [samples.sample_at(start + i) for i in range(samples.samples_per_epoch)]
        assert list(zip(*map(np.ndarray.tolist, samples.epoch_samples(epoch)), strict=True)) == (
            expected
        )
