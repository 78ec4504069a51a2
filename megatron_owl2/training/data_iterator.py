"""Iterator over micro-batches on the device, with counts of what they hold and cost."""

import time
from collections import Counter, deque
from collections.abc import Generator, Iterator

import torch

from megatron_owl2.data.batch import Batch, equally_long
from megatron_owl2.data.loader import BatchLoader
from megatron_owl2.training.metrics.accumulator import count_batch
from megatron_owl2.training.sample_consistency import SampleConsistencyCheck


class DataIterator(Iterator[Batch]):
    """Micro-batches of a loader, this context-parallel rank's share of each on the device.

    `last` is the newest one before that: whole, and on the host.
    """

    def __init__(
        self,
        loader: BatchLoader,
        device: torch.device,
        consistency: SampleConsistencyCheck,
        context_parallel: tuple[int, int] = (0, 1),
        group: int = 1,
    ):
        """`context_parallel`: this rank among those that share a sequence, and their number;
        `group`: so many micro-batches are read at once and made equally long."""
        self._loader, self._device = loader, device
        self._batches: Generator[Batch, None, None] = iter(loader)
        self._consistency, self._context_parallel = consistency, context_parallel
        self._group = group
        self._ready: deque[Batch] = deque()
        self._restarts = 0
        self._counts: Counter[str] = Counter()
        self.last: Batch | None = None

    def __next__(self) -> Batch:
        if not self._ready:
            group = [self._read() for _ in range(self._group)]
            self._consistency.verify()
            self._ready.extend(equally_long(group))
        self.last = batch = self._ready.popleft()
        self._counts.update(count_batch(batch))
        share = batch.local_to(*self._context_parallel)
        if self._device.type == "cuda":
            # The loader's tensors are pinned; those cut or padded since would be copied in step
            # with the device.
            share = share.pin_memory()
        return share.to(self._device)

    def _read(self) -> Batch:
        started = time.perf_counter()
        batch = next(self._batches)
        self._consistency.add(batch)
        batch.measurements["wait_seconds"] = time.perf_counter() - started
        batch.measurements["worker_restarts"] = self._loader.restarts - self._restarts
        self._restarts = self._loader.restarts
        return batch

    def take_counts(self) -> Counter[str]:
        """The counts since the last call, as `Metrics.add` takes them."""
        taken, self._counts = self._counts, Counter()
        return taken

    def close(self) -> None:
        """End the data workers."""
        self._batches.close()
