"""Sums of losses and loader metrics: on every rank for itself, over all ranks once per interval."""

from collections import Counter
from collections.abc import Mapping

import torch

from megatron_owl2.data.batch import Batch
from megatron_owl2.training.metrics.loader_metrics import LOADER_METRICS
from megatron_owl2.training.step import SUMS


def seen(source: int) -> str:
    """Name of the count of samples that a data set filled."""
    return f"seen/{source}"


def bad(source: int) -> str:
    """Name of the count of unusable samples of a data set."""
    return f"bad/{source}"


def shortened(source: int) -> str:
    """Name of the count of samples of a data set that lost turns or the end of an answer."""
    return f"shortened/{source}"


def count_batch(batch: Batch) -> Counter[str]:
    """All counts of a micro-batch by name: LOADER_METRICS, and `seen`, `bad` and `shortened`
    per data set."""
    counts = Counter({metric.name: metric.count(batch) for metric in LOADER_METRICS})
    counts.update(map(seen, batch.sources.tolist()))
    counts.update(bad(sample.source) for sample in batch.bad_samples)
    counts.update(map(shortened, batch.shortened))
    return counts


def mean_losses(sums: Mapping[str, float]) -> dict[str, float | None]:
    """Mean loss per target from the totals of SUMS: of all samples, of those with an image, and of
    those without one; None where there are no targets."""
    loss, targets, image_loss, image_targets = map(sums.__getitem__, SUMS)
    text_loss, text_targets = loss - image_loss, targets - image_targets
    return {
        "loss": loss / targets if targets else None,
        "image_loss": image_loss / image_targets if image_targets else None,
        "text_loss": text_loss / text_targets if text_targets else None,
    }


def without_sources(run_totals: dict[str, int]) -> dict[str, int]:
    """The totals of a run that continues with other data sets."""
    kept = {metric.name for metric in LOADER_METRICS if metric.over_run}
    return {name: count for name, count in run_totals.items() if name in kept}


class MetricAccumulator:
    """Totals of an interval, and in `run_totals` those of the whole run since its first step.

    `sources` is the number of data sets, `model_ranks` how many ranks share one model,
    `run_totals` what a checkpoint has kept.
    """

    def __init__(
        self, sources: int, model_ranks: int, device: torch.device, run_totals: dict[str, int]
    ):
        by_source = [name(index) for name in (seen, bad, shortened) for index in range(sources)]
        metrics = [metric.name for metric in LOADER_METRICS]
        self.device = device
        self._model_ranks = model_ranks
        of_samples = {metric.name for metric in LOADER_METRICS if not metric.of_each_rank}
        self._of_samples = of_samples | set(by_source)
        self._names = (*SUMS, *metrics, *by_source)
        # Counts stay on the host, where they come from, until all ranks add theirs up.
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self._counts = torch.zeros(len(self._names) - len(SUMS), dtype=torch.float64)
        over_run = [metric.name for metric in LOADER_METRICS if metric.over_run]
        self.run_totals = dict.fromkeys((*over_run, *by_source), 0) | run_totals

    def add(self, sums: torch.Tensor, counts: Counter[str]) -> None:
        """Count one step of this rank: its SUMS, and the counts of its micro-batches."""
        self._sums += sums
        counted = [counts[name] for name in self._names[len(SUMS) :]]
        self._counts += torch.tensor(counted, dtype=torch.float64)

    def take(self) -> dict[str, float]:
        """The totals since the last call over all ranks, every sample counted once; all ranks
        together."""
        every = torch.cat([self._sums, self._counts.to(self.device)])
        torch.distributed.all_reduce(every)
        totals = dict(zip(self._names, every.tolist(), strict=True))
        self._sums.zero_()
        self._counts.zero_()
        for name in self._of_samples:
            totals[name] /= self._model_ranks
        for name in self.run_totals:
            self.run_totals[name] += round(totals[name])
        return totals
