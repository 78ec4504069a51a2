"""Data loader of one data-parallel rank: worker processes that are replaced when they die."""

import copy
import gc
import logging
import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.context import ForkContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler

from megatron_owl2.config.schema import DataConfig
from megatron_owl2.data.bad_samples import BadSampleLog
from megatron_owl2.data.batch import Batch
from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.data.sampling.prefetch import working_set
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.training_dataset import TrainingDataset
from megatron_owl2.data.training_order import TrainingOrder
from megatron_owl2.errors import DataError, LoaderError

_logger = logging.getLogger(__name__)
MAX_RESTARTS = 3  # of the workers, without CALM batches in between
CALM = 1000
_LOOK = 1.0  # seconds between two looks at workers that give nothing


class MicroBatchSampler(Sampler[list[int]]):
    """Sampler of the sample indices of each micro-batch of one data-parallel rank.

    They go from `start_sample` on; `limit` is the number of samples of all ranks together.
    """

    def __init__(self, start_sample: int, rank: int, ranks: int, size: int, limit: int | None):
        if not 0 <= rank < ranks:
            raise ValueError(f"data-parallel rank {rank} of {ranks}")
        if limit is not None and limit % (ranks * size):
            raise ValueError(
                f"limit_samples {limit} is not a multiple of {size} micro-batch rows x {ranks} "
                "data-parallel ranks, so the ranks would end at different times"
            )
        self._first = start_sample + (rank - start_sample) % ranks
        self._ranks = ranks
        self._size = size
        self._end = None if limit is None else start_sample + limit

    def after(self, done: int) -> "MicroBatchSampler":
        """The same without the first `done` micro-batches."""
        rest = copy.copy(self)
        rest._first += done * self._ranks * self._size
        return rest

    def __iter__(self) -> Iterator[list[int]]:
        sample_index, step = self._first, self._ranks * self._size
        while self._end is None or sample_index < self._end:
            yield list(range(sample_index, sample_index + step, self._ranks))
            sample_index += step


class BatchLoader:
    """Iterable over batches in order, with a log of bad samples; always from the same first sample.

    A worker that the system kills is replaced: batches are a function of their sample indices, so
    nothing is lost. Raises DataError when too many samples are bad, and LoaderError when workers
    are killed again and again or give nothing.
    """

    def __init__(
        self,
        dataset: TrainingDataset,
        batches: MicroBatchSampler,
        config: DataConfig,
        bad_sample_log: Path | None,
        taken_at_once: int = 1,
    ):
        self.restarts = 0  # of the workers, over all iterations
        self._dataset = dataset
        self._batches = batches
        self._config = config
        self._bad_sample_log = bad_sample_log
        self._prefetch = max(config.prefetch, -(-taken_at_once // max(config.workers, 1)))

    def __iter__(self) -> Generator[Batch, None, None]:
        config = self._config
        log = BadSampleLog(self._bad_sample_log, config.max_bad_fraction, config.max_bad_in_a_row)
        try:
            for batch in self._survive():
                log.add(batch)
                yield batch
        finally:
            self._dataset.close()

    def _survive(self) -> Iterator[Batch]:
        """The batches, from new workers where the old ones were killed."""
        done = calm_at = deaths = 0
        others = set(multiprocessing.active_children())
        while True:
            rest = self._batches.after(done)
            try:
                batches = self._open(rest)
                while (batch := self._wait(batches, rest)) is not None:
                    yield batch
                    done += 1
                    rest = self._batches.after(done)
                return
            except (RuntimeError, OSError, EOFError) as error:
                # A death shows in many ways, such as a broken pipe; what the dataset itself raises
                # comes as "Caught ...".
                own = isinstance(error, DataError | LoaderError)
                known = str(error).startswith(("Caught", "Too many open files"))
                if own or known or not self._config.workers:
                    raise
                deaths = deaths + 1 if done < calm_at else 1
                calm_at = done + CALM
                what = f"a data worker ended unexpectedly after {done} micro-batches ({error})"
                if deaths > MAX_RESTARTS:
                    raise LoaderError(
                        f"{what}, {deaths} times in short order; if memory or /dev/shm is short, "
                        "lower data.workers or data.prefetch. The run can go on from its last "
                        "checkpoint"
                    ) from error
                self.restarts += 1
                _logger.warning(
                    "%s; starting the workers again (%d of %d times)", what, deaths, MAX_RESTARTS
                )
            finally:
                _end(set(multiprocessing.active_children()) - others)

    def _wait(self, batches: Iterator[Batch], rest: MicroBatchSampler) -> Batch | None:
        """The next batch, or None at the end; the samples of `rest` are still to come."""
        limit = self._config.stall_timeout
        started = time.monotonic()
        while True:
            try:
                return next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                if time.monotonic() - started > limit:
                    indices = next(iter(rest))
                    raise LoaderError(
                        f"the data workers gave nothing for {limit:g} seconds (data.stall_timeout);"
                        f" next are the samples {indices[0]} to {indices[-1]}. A disk may hang; "
                        "the run can go on from its last checkpoint"
                    ) from error

    def _open(self, batches: MicroBatchSampler) -> Iterator[Batch]:
        workers = self._config.workers
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=batches,
            num_workers=workers,
            prefetch_factor=self._prefetch if workers else None,
            timeout=_LOOK if workers else 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the global random state belongs to the model
            worker_init_fn=_leave_signals_to_the_trainer,
            multiprocessing_context=_WorkerContext() if workers else None,
        )
        if not workers:
            return iter(loader)
        # torch reports a death from a signal handler, that is anywhere in a training step; without
        # it the death shows when a batch is asked for, where it can be mended.
        handler = signal.getsignal(signal.SIGCHLD)
        # A worker's collector would also free what the trainer left to its own, such as process
        # groups and tensors on a GPU, which crashes a forked process.
        gc.freeze()
        try:
            iterator = iter(loader)
        finally:
            gc.unfreeze()
        if threading.current_thread() is threading.main_thread():
            torchs = getattr(handler, "__module__", "").startswith("torch.")  # another loader's
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs else handler)
        return iterator


class _WorkerContext(ForkContext):
    """Context that forks workers with an end-of-data flag that none can leave locked.

    torch shares one event among all workers and the trainer and asks it at every batch. A worker
    that is killed inside would keep the lock of multiprocessing's event, for which all of them,
    the trainer too, would wait for ever.
    """

    def Event(self) -> "_Flag":
        return _Flag()


class _Flag:
    """An event in a byte that forked processes share: set once, asked without waiting."""

    def __init__(self):
        self._byte = mmap.mmap(-1, 1)

    def is_set(self) -> bool:
        return self._byte[0] != 0

    def set(self) -> None:
        self._byte[0] = 1


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the trainer ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(workers: set[BaseProcess]) -> None:
    """End workers at once, whatever they wait for.

    torch would wait for them when their iterator is collected. After an error that is at any later
    moment and in any thread, such as the one that serves all network requests.
    """
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join()


def build_loader(
    config: DataConfig,
    datasets: Sequence[ShardedDataset],
    order: TrainingOrder,
    builder: SampleBuilder,
    *,
    row_alignment: int,
    micro_batch_size: int,
    start_sample: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    bad_sample_log: str | Path | None = None,
    limit_samples: int | None = None,
    taken_at_once: int = 1,
) -> BatchLoader:
    """The batches of one data-parallel rank from row index `start_sample` on, in the order of a
    phase.

    `datasets` are those of `config.sources` (open_sources).

    Each of R ranks gets the rows s of one s % R (ShuffleOrder.residue) in increasing order: if R
    divides the global batch size, every global batch holds the same samples for any R. Batches do
    not depend on `config.workers` (0: no worker processes), and are as long as their longest row
    and `row_alignment` ask (row_length.py). Workers have `taken_at_once` batches ready.
    `limit_samples` ends after that many rows of all ranks together. `bad_sample_log` is the file
    that gets one JSON line for every unusable sample of a batch that was handed out. Raises
    ValueError for a rank or limit that does not fit."""
    dataset = TrainingDataset(config, datasets, order, builder, row_alignment)
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Balanced rows come from all streams, wherever they are read.
    readers = 1 if order.packed is not None else data_parallel_size
    needed = working_set(datasets, order.samples, readers, on_node) / 2**30
    if needed > config.storage.cache_gib and data_parallel_rank == 0:
        _logger.warning(
            "data.storage.cache_gib is %g, but the ranks of a node read about %.1f GiB of shards "
            "side by side; with a smaller cache they are fetched more than once",
            config.storage.cache_gib,
            needed,
        )
    residue = order.samples.residue(data_parallel_rank, data_parallel_size)
    batches = MicroBatchSampler(
        start_sample, residue, data_parallel_size, micro_batch_size, limit_samples
    )
    return BatchLoader(
        dataset,
        batches,
        config,
        None if bad_sample_log is None else Path(bad_sample_log),
        taken_at_once,
    )
