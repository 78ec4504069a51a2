"""Processes over the splits of a corpus, with a progress bar that moves inside a split."""

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from data_prep.splits import InputSplit, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import PreprocessError
from megatron_owl2.utils.process_pool import SPAWN, ProcessPool, WorkerDiedError

_PERIOD = 0.2  # seconds between two looks at the workers
_LOG_PERIOD = 30.0  # seconds between two lines where the bar goes into a log file

Tick = Callable[[Record | Skipped], None]  # called with every sample that is read
Work = Callable[[InputSplit, Tick], None]
_counters: Any = None  # in a worker process: samples read, bytes read, whether to stop


class _StopError(Exception):
    """Request to give up this split, since another one failed."""


class SplitPool:
    """Pool of `workers` processes that take one split at a time; one worker is this process.

    A context manager. An error in one split stops the others; what is complete stays.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._counters = SPAWN.Array("q", 3)
        self._executor: ProcessPool | None = None

    def __enter__(self) -> "SplitPool":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._executor is not None:
            self._counters[2] = kind is not None
            self._executor.shutdown(cancel_futures=True)

    def run(self, work: Work, splits: Sequence[InputSplit], verb: str) -> None:
        """Calls of work(split, tick) for every split.

        Raises PreprocessError naming the split if a file cannot be read or written, or naming the
        splits in work if a process was killed.
        """
        self._counters[0] = self._counters[1] = 0
        with _Bar(len(splits), verb, self._counters) as bar:
            if min(self._workers, len(splits)) > 1:
                self._run_in_processes(work, splits, bar)
                return

            def tick(item: Record | Skipped) -> None:
                _count(self._counters, item)
                bar.show()

            for split in splits:
                _attempt(work, split, tick)
                bar.finish_split()

    def _run_in_processes(self, work: Work, splits: Sequence[InputSplit], bar: "_Bar") -> None:
        if self._executor is None:
            self._executor = ProcessPool(self._workers, _keep_counters, (self._counters,))
        try:
            for _ in self._executor.as_completed(partial(_work, work), splits, bar.show, _PERIOD):
                bar.finish_split()
        except WorkerDiedError as error:
            names = ", ".join(split.name for split in error.items)
            raise PreprocessError(
                f"{error}, while these splits were in work: {names}; start again with fewer "
                "--workers: finished splits are kept"
            ) from None


class _Bar:
    """Progress bar: splits done, samples and megabytes that the readers yield per second."""

    def __init__(self, splits: int, verb: str, counters: Any):
        self._counters = counters
        self._start = self._shown = time.monotonic()
        self._period = _PERIOD if sys.stderr.isatty() else _LOG_PERIOD
        self._bar = tqdm(
            total=splits, unit="split", desc=verb, mininterval=self._period, disable=not splits
        )

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        self._shown = 0.0
        self.show()
        self._bar.close()

    def finish_split(self) -> None:
        self._bar.update()

    def show(self) -> None:
        now = time.monotonic()
        if now - self._shown < self._period:
            return
        self._shown = now
        samples, size = (count / max(now - self._start, 1e-9) for count in self._counters[:2])
        self._bar.set_postfix_str(f"{samples:.0f} samples/s, {size / 1e6:.1f} MB/s read")


def _keep_counters(counters: Any) -> None:
    global _counters
    _counters = counters


def _work(work: Work, split: InputSplit) -> None:
    _attempt(work, split, partial(_count, _counters))


def _attempt(work: Work, split: InputSplit, tick: Tick) -> None:
    try:
        with warnings.catch_warnings():
            # What Pillow finds odd in one image of millions; what it cannot read it refuses.
            warnings.filterwarnings("ignore", module="PIL")
            work(split, tick)
    except OSError as error:
        raise PreprocessError(
            f"split {split.name}: {error}; finished splits are kept: put it right and start again"
        ) from None
    except Exception as error:
        error.add_note(f"while working on split {split.name}")
        raise


def _count(counters: Any, item: Record | Skipped) -> None:
    if counters[2]:
        raise _StopError
    with counters.get_lock():
        counters[0] += 1
        if isinstance(item, Record):
            counters[1] += sum(map(len, item.images)) + len(item.caption or "")
