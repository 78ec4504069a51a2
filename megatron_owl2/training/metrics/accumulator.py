"""What is counted while a run goes on: on every rank for itself, summed once per interval."""

from collections import Counter

import torch

from megatron_owl2.training.step import SUMS

# Of one step on one rank. All ranks of a model read the same samples, each for itself; seen(i)
# and bad(i) of every data set belong to the first group.
_OF_SAMPLES = ("tokens", "vision_tokens", "pairs", "bad_samples", "shortened_samples")
_OF_PROCESSES = (
    "wait_seconds",
    "bytes",
    "read_seconds",
    "decode_seconds",
    "read_retries",
    "worker_restarts",
)
OF_THE_RUN = ("bad_samples", "shortened_samples", "read_retries", "worker_restarts")


def seen(source: int) -> str:
    """Name of the count of samples that a data set filled."""
    return f"seen/{source}"


def bad(source: int) -> str:
    """Name of the count of unusable samples of a data set."""
    return f"bad/{source}"


def without_sources(counts: dict) -> dict:
    """The counts of a run that goes on with other data sets."""
    return {name: count for name, count in counts.items() if name in OF_THE_RUN}


class MetricAccumulator:
    """Totals of an interval, and in `run` those of the whole run since its first step.

    `sources` is the number of data sets, `model_ranks` how many ranks share one model, `run` what
    a checkpoint has kept.
    """

    def __init__(self, sources: int, model_ranks: int, device: torch.device, run: dict):
        by_source = [name(index) for name in (seen, bad) for index in range(sources)]
        self.device = device
        self._of_samples = {*_OF_SAMPLES, *by_source}
        self._model_ranks = model_ranks
        self._names = (*SUMS, *_OF_SAMPLES, *by_source, *_OF_PROCESSES)
        self._totals = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self.run = dict.fromkeys((*OF_THE_RUN, *by_source), 0) | run

    def add(self, sums: torch.Tensor, counts: Counter) -> None:
        """Count one step of this rank: its SUMS, and what its data were by name."""
        self._totals[: len(SUMS)] += sums
        data = [counts[name] for name in self._names[len(SUMS) :]]
        self._totals[len(SUMS) :] += torch.tensor(
            data, dtype=torch.float64, device=self._totals.device
        )

    def take(self) -> dict[str, float]:
        """The totals since the last call over all ranks, every sample counted once; all ranks
        together."""
        torch.distributed.all_reduce(self._totals)
        totals = dict(zip(self._names, self._totals.tolist(), strict=True))
        self._totals.zero_()
        for name in self._of_samples:
            totals[name] /= self._model_ranks
        for name in self.run:
            self.run[name] += round(totals[name])
        return totals
