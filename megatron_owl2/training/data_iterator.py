"""Iterator over micro-batches on the device, with counts of what they hold and cost."""

import time
from collections import Counter
from collections.abc import Generator, Iterator

import torch

from megatron_owl2.data.batch import Batch
from megatron_owl2.data.loader import BatchLoader
from megatron_owl2.training.metrics.accumulator import count_batch
from megatron_owl2.training.sample_consistency import SampleConsistencyCheck


class DataIterator(Iterator[Batch]):
    """Micro-batches of a loader, this context-parallel rank's share of each on the device.

    `last` is the newest one as the loader made it: whole, and on the host.
    """

    def __init__(
        self,
        loader: BatchLoader,
        device: torch.device,
        consistency: SampleConsistencyCheck,
        context_parallel: tuple[int, int] = (0, 1),
    ):
        """`context_parallel`: this rank among those that share a sequence, and their number."""
        self._loader, self._device = loader, device
        self._batches: Generator[Batch, None, None] = iter(loader)
        self._consistency, self._context_parallel = consistency, context_parallel
        self._restarts = 0
        self._counts: Counter[str] = Counter()
        self.last: Batch | None = None

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self._batches)
        self._consistency.add(batch)
        batch.measurements["wait_seconds"] = time.perf_counter() - started
        batch.measurements["worker_restarts"] = self._loader.restarts - self._restarts
        self._restarts = self._loader.restarts
        self._counts.update(count_batch(batch))
        self.last = batch
        return batch.local_to(*self._context_parallel).to(self._device)

    def take_counts(self) -> Counter[str]:
        """The counts since the last call, as `Metrics.add` takes them."""
        taken, self._counts = self._counts, Counter()
        return taken

    def close(self) -> None:
        """End the data workers."""
        self._batches.close()
