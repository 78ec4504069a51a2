"""Micro-batches from the loader to the device, counted on the way."""

import time
from collections import Counter
from collections.abc import Iterator

import torch

from megatron_owl2.data.batch import Batch
from megatron_owl2.data.loader import BatchLoader
from megatron_owl2.training.metrics import accumulator as counts
from megatron_owl2.training.sample_consistency import SampleConsistencyCheck


class DataIterator(Iterator[Batch]):
    """Micro-batches on the device; counts what they hold and what they cost.

    `last` is the newest one as the loader made it: whole, and on the host.
    """

    def __init__(
        self,
        loader: BatchLoader,
        device: torch.device,
        agreement: SampleConsistencyCheck,
        context: tuple[int, int] = (0, 1),
    ):
        """`context`: this context-parallel rank, and how many share a sequence."""
        self._loader, self._batches, self._device = loader, iter(loader), device
        self._agreement, self._context = agreement, context
        self._restarts = 0
        self._counts = Counter()
        self.last: Batch | None = None

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self._batches)
        self._agreement.add(batch)
        self._counts["wait_seconds"] += time.perf_counter() - started
        self._counts["tokens"] += int(batch.lengths.sum())
        self._counts["vision_tokens"] += len(batch.vision_token_index)
        self._counts["pairs"] += int((batch.lengths * (batch.lengths + 1) // 2).sum())
        self._counts["bad_samples"] += batch.bad
        self._counts["shortened_samples"] += batch.shortened
        self._counts["read_retries"] += batch.cost.retries
        self._counts["bytes"] += batch.cost.bytes
        self._counts["read_seconds"] += batch.cost.read_seconds
        self._counts["decode_seconds"] += batch.cost.decode_seconds
        for source in batch.sources.tolist():
            self._counts[counts.seen(source)] += 1
        for sample in batch.bad_samples:
            self._counts[counts.bad(sample.source)] += 1
        self.last = batch
        return batch.local_to(*self._context).to(self._device)

    def take_counts(self) -> Counter:
        """The counts since the last call, as `Metrics.add` takes them."""
        self._counts["worker_restarts"] = self._loader.restarts - self._restarts
        self._restarts = self._loader.restarts
        taken, self._counts = self._counts, Counter()
        return taken

    def close(self) -> None:
        """End the data workers."""
        self._batches.close()
