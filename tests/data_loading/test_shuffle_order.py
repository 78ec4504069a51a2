"""The order of training: exact epochs, exact shares, the same global batches for any ranks."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_owl2.data.loader import MicroBatchSampler
from megatron_owl2.data.sampling.keyed_random import KeyedRandom, combine, permutation, splitmix64
from megatron_owl2.data.sampling.shuffle import ShuffleOrder

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=8)
small = dict(streams=st.integers(1, 7), block=st.integers(1, 20), shuffle_block=st.integers(1, 50))


def all_samples(shards: list[int]) -> set[tuple[int, int]]:
    return {(shard, i) for shard, size in enumerate(shards) for i in range(size)}


def test_splitmix64_reference_values():
    """The first outputs of the published generator for seed 0, alone and as a permutation's key."""
    golden = 0x9E3779B97F4A7C15
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(golden) == 0x6E789E6AA1B965F4
    key = combine(1, 2)
    hashes = [splitmix64(i ^ key) for i in range(100)]
    assert permutation(100, key).tolist() == sorted(range(100), key=hashes.__getitem__)


def test_keyed_floats_are_uniform_and_repeat():
    random = KeyedRandom(7, 1)
    draws = [random.uniform(2, 4) for _ in range(4000)]
    again = KeyedRandom(7, 1)
    assert draws[:10] == [again.uniform(2, 4) for _ in range(10)]
    assert draws[0] != KeyedRandom(7, 2).uniform(2, 4)
    assert min(draws) >= 2 and max(draws) < 4
    assert abs(np.mean(draws) - 3) < 0.04 and abs(np.var(draws) - 1 / 3) < 0.02
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.06


@settings(max_examples=60)
@given(shards=sizes, seed=st.integers(0, 2**63), **small)
def test_every_sample_once_in_every_epoch(shards, seed, streams, block, shuffle_block):
    order = ShuffleOrder([shards], [0.3], seed, streams, block, shuffle_block)
    length = sum(shards)
    assert order.samples_per_epoch == length
    for epoch in range(3):
        seen = [
            order.sample_at(sample_index)[1:]
            for sample_index in range(epoch * length, (epoch + 1) * length)
        ]
        assert len(seen) == len(set(seen)) and set(seen) == all_samples(shards)


@settings(max_examples=60)
@given(
    sources=st.lists(st.tuples(sizes, st.floats(0.05, 1)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    **small,
)
def test_shares_are_the_weights_and_nothing_is_left_out(
    sources, seed, streams, block, shuffle_block
):
    shards, weights = zip(*sources, strict=True)
    order = ShuffleOrder(shards, weights, seed, streams, block, shuffle_block)
    seen = Counter(order.sample_at(sample_index) for sample_index in range(order.samples_per_epoch))
    length = max(sum(s) * sum(weights) / w for s, w in sources)
    for index, (source, weight) in enumerate(sources):
        counts = [seen[index, shard, i] for shard, i in all_samples(source)]
        assert abs(sum(counts) - weight / sum(weights) * length) <= 0.5 + 1e-6
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1
    assert min(order.dataset_samples_per_epoch[i] - sum(s) for i, (s, _) in enumerate(sources)) == 0


@settings(max_examples=40)
@given(
    shards=sizes, seed=st.integers(0, 2**32), sample_indices=st.lists(st.integers(0, 2000)), **small
)
def test_a_sample_does_not_depend_on_what_was_asked_before(
    shards, seed, sample_indices, streams, block, shuffle_block
):
    used = ShuffleOrder([shards, shards], [1, 2], seed, streams, block, shuffle_block)
    for sample_index in sample_indices:
        fresh = ShuffleOrder([shards, shards], [1, 2], seed, streams, block, shuffle_block)
        assert used.sample_at(sample_index) == fresh.sample_at(sample_index)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("start", [0, 48, 96])
def test_global_batches_are_the_same_for_any_number_of_ranks(ranks, start):
    streams = [iter(MicroBatchSampler(start, rank, ranks, 2, None)) for rank in range(ranks)]
    for step in range(4):
        batch = []
        for stream in streams:
            rows = [sample_index for _ in range(48 // ranks // 2) for sample_index in next(stream)]
            assert rows == sorted(rows)
            batch += rows
        assert sorted(batch) == list(range(start + 48 * step, start + 48 * (step + 1)))


def test_ranks_may_change_at_any_global_batch():
    first = next(iter(MicroBatchSampler(7, 0, 2, 3, None)))
    assert first == [8, 10, 12]  # samples keep their rank s % R even from an odd start
    assert list(MicroBatchSampler(10, 1, 2, 2, 8)) == [[11, 13], [15, 17]]
    with pytest.raises(ValueError, match="limit_samples 10 is not a multiple"):
        MicroBatchSampler(0, 0, 2, 2, 10)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        MicroBatchSampler(0, 2, 2, 2, None)


@settings(max_examples=40)
@given(shards=sizes, seed=st.integers(0, 2**32), sample_index=st.integers(0, 500), **small)
def test_substitutes_come_from_the_same_shuffle_block(
    shards, seed, sample_index, streams, block, shuffle_block
):
    order = ShuffleOrder([shards], [1], seed, streams, block, shuffle_block)
    length = sum(shards)
    epoch, position = divmod(sample_index, length)
    neighbours = {}  # samples of the same stream and epoch, and when they come
    for p in range(position % order.streams, length, order.streams):
        neighbours[order.sample_at(epoch * length + p)] = p // order.streams
    turn = position // order.streams
    for attempt in range(1, 9):
        other = order.sample_at(sample_index, attempt)
        assert other == order.sample_at(sample_index, attempt)
        assert abs(neighbours[other] - turn) < 2 * shuffle_block
        assert other != order.sample_at(sample_index) or len(neighbours) == 1 or shuffle_block == 1


def test_small_sets_are_shuffled_completely():
    """A set of 3,000 sorted samples: any 64 samples are spread over it evenly."""
    order = ShuffleOrder([[1000, 1000, 1000]], [1], seed=5)
    assert order.streams == 1
    places = np.array([s * 1000 + i for _, s, i in map(order.sample_at, range(2 * 3000))])
    for start in range(0, 6000 - 64, 640):
        batch = places[start : start + 64]
        assert np.histogram(batch, bins=3, range=(0, 3000))[0].min() > 3
    assert (places[:3000] != places[3000:]).mean() > 0.99  # another order in the next epoch
    assert abs(np.corrcoef(np.arange(3000), places[:3000])[0, 1]) < 0.08


def test_neighbours_of_a_large_set_come_from_many_blocks_and_lanes_stay_local():
    order = ShuffleOrder([[1000] * 4000], [1], seed=5)
    assert order.streams == 256
    batch = [order.sample_at(sample_index) for sample_index in range(10_240, 10_240 + 256)]
    assert len({(shard, i // 256) for _, shard, i in batch}) > 230
    stream = [order.sample_at(sample_index) for sample_index in range(3, 256 * 4096, 256)]
    blocks = {(shard, i // 256) for _, shard, i in stream}
    assert 16 <= len(blocks) <= 19  # one shuffle block of 4,096 samples, blocks of 232 or 256


def test_every_epoch_joins_other_blocks_into_shuffle_blocks():
    order = ShuffleOrder([[100] * 200], [1], seed=5, streams=4, block=100, shuffle_block=1000)
    first, second = (
        {
            order.sample_at(sample_index)[1]
            for sample_index in range(epoch * 20_000, epoch * 20_000 + 4000, 4)
        }
        for epoch in (0, 1)
    )
    assert len(first) in (10, 11) and len(first & second) < 5


def test_an_unknown_future_sample_is_cheap():
    order = ShuffleOrder([[10_000] * 3000], [1], seed=1)  # 30 M samples
    assert len(order.sample_at(123_456_789_012)) == 3


def test_impossible_mixtures_are_refused():
    with pytest.raises(ValueError, match="data set 1 is empty"):
        ShuffleOrder([[1], []], [1, 1], 0)
    with pytest.raises(ValueError, match="weights must be positive"):
        ShuffleOrder([[1], [1]], [1, 0], 0)
    with pytest.raises(
        ValueError, match="data set 1 of 10 samples in 1 shards would come 4e.07 times"
    ):
        ShuffleOrder([[10_000] * 40_000, [10]], [1, 1], 0)


@settings(max_examples=40)
@given(shards=sizes, seed=st.integers(0, 2**32), sample_index=st.integers(0, 1000), **small)
def test_shuffle_blocks_say_which_blocks_they_read_and_which_shuffle_block_is_next(
    shards, seed, sample_index, streams, block, shuffle_block
):
    order = ShuffleOrder([shards], [1], seed, streams, block, shuffle_block)
    here, following = order.shuffle_block(sample_index), order.next_shuffle_block(sample_index)
    number = sample_index
    while order.shuffle_block(number) == here:
        number += order.streams
        if number // order.samples_per_epoch > sample_index // order.samples_per_epoch:
            number = (sample_index // order.samples_per_epoch + 1) * order.samples_per_epoch + here[
                1
            ]
    assert following == number and order.shuffle_block(following)[1] == here[1]
    blocks = {(s, first - first % block) for _, s, first in order.blocks(sample_index)}
    sample_indices = [
        s
        for s in range(sample_index // order.samples_per_epoch * order.samples_per_epoch, following)
    ]
    read = {order.sample_at(s)[1:] for s in sample_indices if order.shuffle_block(s) == here}
    assert {(s, sample - sample % block) for s, sample in read} == blocks


@pytest.mark.parametrize("ranks", [1, 3, 4, 12, 16, 24, 1000])
@pytest.mark.parametrize("on_node", [1, 4, 8])
def test_ranks_that_share_streams_are_neighbours(ranks, on_node):
    order = ShuffleOrder([[4096]], [1], seed=1, streams=8, block=16, shuffle_block=64)
    residues = [order.residue(rank, ranks) for rank in range(ranks)]
    assert sorted(residues) == list(range(ranks))
    read = [{s % 8 for s in range(r, r + 8 * ranks, ranks)} for r in residues]
    # What one rank shares with any other it shares with those around it.
    for mine in set(map(frozenset, read)):
        sharing = [rank for rank in range(ranks) if read[rank] & mine]
        assert sharing == list(range(sharing[0], sharing[-1] + 1))
    nodes = [set().union(*read[n : n + on_node]) for n in range(0, ranks, on_node)]
    assert order.streams_of_nodes(ranks, on_node) == [len(node) for node in nodes]
    if 8 % ranks == 0:
        assert residues == list(range(ranks)), "an order that older runs know"


@settings(max_examples=30)
@given(shards=sizes, seed=st.integers(0, 2**32), sample_index=st.integers(0, 1000), **small)
def test_a_whole_shuffle_block_is_its_samples_in_their_order(
    shards, seed, sample_index, streams, block, shuffle_block
):
    order = ShuffleOrder([shards, shards], [1, 2], seed, streams, block, shuffle_block)
    identity = order.shuffle_block(sample_index)
    first, length = sample_index, 0
    while first >= order.streams and order.shuffle_block(first - order.streams) == identity:
        first -= order.streams
    parts = order.shuffle_block_samples(sample_index)
    for found in zip(*(part.tolist() for part in parts), strict=True):
        assert order.sample_at(first + length * order.streams) == found
        length += 1
    assert order.next_shuffle_block(first) >= first + (length - 1) * order.streams
