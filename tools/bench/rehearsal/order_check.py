"""Proof that the ranks together read every sample once, with the real order."""

import time
from dataclasses import dataclass
from multiprocessing.pool import Pool

import numpy as np

from megatron_owl2.data.loader import MicroBatchSampler
from megatron_owl2.data.sampling.shuffle import SHUFFLE_BLOCK_SIZE, ShuffleOrder
from rehearsal.cluster import Cluster, Progress

_JOBS = 16  # each with a bitmap of all samples
_BITS = np.uint8(1) << np.arange(8, dtype=np.uint8)


@dataclass
class OrderProof:
    """Samples of the data set, those handed out in the part of an epoch that was looked at, how
    many different ones these were, and seconds of one process to make the order."""

    samples: int
    handed_out: int
    distinct: int
    order_seconds: float

    @property
    def exact(self) -> bool:
        return self.handed_out == self.distinct


def make_order(shards: int, samples: int) -> tuple[ShuffleOrder, float]:
    """The order of an epoch, ready to read from, and the seconds that it took."""
    began = time.process_time()
    order = ShuffleOrder([[samples] * shards], [1.0], seed=1234)
    order.sample_at(0)
    return order, time.process_time() - began


def check_epoch(
    shards: int, samples: int, share: float, pool: Pool, progress: Progress
) -> OrderProof:
    """Mark every sample of the first `share` of every stream's shuffle blocks in a bitmap; all of
    them are an epoch. As many different ones as were handed out: none came twice."""
    order, seconds = make_order(shards, samples)
    jobs = min(_JOBS, order.streams)
    work = [(shards, samples, share, range(j, order.streams, jobs)) for j in range(jobs)]
    seen = np.zeros(-(-shards * samples // 8), np.uint8)
    handed_out = 0
    for done, (count, bitmap) in enumerate(pool.imap_unordered(_mark_streams, work)):
        handed_out += count
        seen |= bitmap
        progress(f"{done + 1} of {jobs} parts, {handed_out:,} samples")
    distinct = sum(int(np.unpackbits(part).sum()) for part in np.array_split(seen, _JOBS))
    return OrderProof(shards * samples, handed_out, distinct, seconds)


def check_ranks(cluster: Cluster, order: ShuffleOrder, steps: int) -> None:
    """Raise AssertionError unless the micro-batches of all ranks are the global batches."""
    for step in range(steps):
        start = step * cluster.global_batch
        seen = np.zeros(cluster.global_batch, np.int64)
        for rank in range(cluster.ranks):
            residue = order.residue(rank, cluster.ranks)
            sampler = iter(
                MicroBatchSampler(start, residue, cluster.ranks, cluster.micro_batch, None)
            )
            for _ in range(cluster.micro_batches):
                np.add.at(seen, np.array(next(sampler)) - start, 1)
        assert (seen == 1).all(), f"step {step}: a sample is missing or comes twice"


def _mark_streams(work: tuple[int, int, float, range]) -> tuple[int, np.ndarray]:
    shards, samples, share, streams = work
    order = make_order(shards, samples)[0]
    seen = np.zeros(-(-shards * samples // 8), np.uint8)
    shuffle_blocks = max(1, order.samples_per_epoch // order.streams // SHUFFLE_BLOCK_SIZE)
    handed_out = 0
    for stream in streams:
        index = stream
        for _ in range(max(1, round(share * shuffle_blocks))):
            _, shard, sample = order.shuffle_block_samples(index)
            place = shard * samples + sample
            np.bitwise_or.at(seen, place >> 3, _BITS[place & 7])
            handed_out += len(place)
            index = order.next_shuffle_block(index)
    return handed_out, seen
