"""Loader metrics: everything counted of micro-batches, each declared once.

A metric that is added to LOADER_METRICS is counted on every rank, summed over the ranks once per
interval, and reported in metrics.jsonl (and so in wandb).
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_owl2.data.batch import Batch


@dataclass(frozen=True)
class Interval:
    """An interval of training between two rows of metrics.jsonl.

    `reads`: samples read, by every rank for itself; `ranks`: of the whole job; `tokens`: those that
    are not padding.
    """

    seconds: float
    reads: int
    ranks: int
    tokens: float


def _per_second(total: float, interval: Interval) -> float:
    return total / interval.seconds


@dataclass(frozen=True)
class LoaderMetric:
    """One number counted of every micro-batch.

    `count` takes the batch as the loader made it. `of_each_rank`: work that every rank does for
    itself; other counts are of samples, which all ranks of one model read and which count once.
    `report` makes the value of the key `reported_as` from the interval's total. `over_run`: the
    total since the first step, kept in checkpoints, is reported under the metric's own name, and
    the console shows it where it is not 0.
    """

    name: str
    count: Callable[[Batch], float]
    of_each_rank: bool = False
    reported_as: str | None = None
    report: Callable[[float, Interval], float | None] = _per_second
    over_run: bool = False


def _measured(name: str) -> Callable[[Batch], float]:
    return lambda batch: batch.measurements[name]


def _milliseconds_of_a_read(total: float, interval: Interval) -> float | None:
    """None where every sample of the interval was unusable."""
    return total / interval.reads * 1e3 if interval.reads else None


LOADER_METRICS = (
    LoaderMetric("tokens", lambda batch: int(batch.lengths.sum()), reported_as="tokens_per_second"),
    # What the decoder computes for the tokens, padding included.
    LoaderMetric(
        "positions",
        lambda batch: batch.tokens.numel(),
        reported_as="padding_share",
        report=lambda total, interval: 1 - interval.tokens / total,
    ),
    LoaderMetric("target_tokens", lambda batch: int(batch.loss_mask.sum())),
    LoaderMetric("vision_tokens", lambda batch: len(batch.vision_token_index)),
    LoaderMetric("samples", lambda batch: len(batch.keys)),
    # Queries and the keys each of them sees, n (n + 1) / 2 for n tokens of a sample.
    LoaderMetric("pairs", lambda batch: sum(n * (n + 1) // 2 for n in batch.sample_lengths)),
    LoaderMetric(
        "wait_seconds",
        _measured("wait_seconds"),
        of_each_rank=True,
        reported_as="data_wait_share",
        report=lambda total, interval: total / interval.ranks / interval.seconds,
    ),
    LoaderMetric(
        "bytes",
        _measured("bytes"),
        of_each_rank=True,
        reported_as="data_megabytes_per_second",
        report=lambda total, interval: total / interval.seconds / 1e6,
    ),
    LoaderMetric(
        "read_seconds",
        _measured("read_seconds"),
        of_each_rank=True,
        reported_as="read_milliseconds",
        report=_milliseconds_of_a_read,
    ),
    LoaderMetric(
        "decode_seconds",
        _measured("decode_seconds"),
        of_each_rank=True,
        reported_as="decode_milliseconds",
        report=_milliseconds_of_a_read,
    ),
    LoaderMetric("bad_samples", lambda batch: batch.bad, over_run=True),
    LoaderMetric("shortened_samples", lambda batch: len(batch.shortened), over_run=True),
    LoaderMetric("read_retries", _measured("read_retries"), of_each_rank=True, over_run=True),
    LoaderMetric("worker_restarts", _measured("worker_restarts"), of_each_rank=True, over_run=True),
)
