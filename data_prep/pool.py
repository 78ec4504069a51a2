"""Many processes over the parts of a corpus, with a progress bar that moves inside a part."""

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from data_prep.splits import InputSplit, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import PreprocessError
from megatron_owl2.utils.process_pool import SPAWN, ProcessPool

_PERIOD = 0.2  # seconds between two looks at the workers
_LOG_PERIOD = 30.0  # seconds between two lines where the bar goes into a log file

Tick = Callable[[Record | Skipped], None]
Work = Callable[[InputSplit, Tick], None]
_counters = None  # in a worker process: samples read, bytes read, whether to stop


class _StopError(Exception):
    """Another part failed, so this one is given up."""


class Pool:
    """`workers` processes that take parts; with one, this process works itself.

    A context manager. An error in one part stops the others; what is complete stays.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._counters = SPAWN.Array("q", 3)
        self._executor: ProcessPool | None = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._executor is not None:
            self._counters[2] = kind is not None
            self._executor.shutdown(cancel_futures=True)

    def run(self, work: Work, parts: Sequence[InputSplit], verb: str) -> None:
        """Call work(part, tick) for every part; it calls tick with every sample that it reads.

        Raises PreprocessError naming the part if a file cannot be read or written, or naming the
        parts in work if a process was killed.
        """
        self._counters[0] = self._counters[1] = 0
        with _Bar(len(parts), verb, self._counters) as bar:
            if min(self._workers, len(parts)) > 1:
                self._share_out(work, parts, bar)
                return
            for part in parts:
                _attempt(work, part, lambda item: (_count(self._counters, item), bar.show()))
                bar.finish_part()

    def _share_out(self, work: Work, parts: Sequence[InputSplit], bar: "_Bar") -> None:
        if self._executor is None:
            self._executor = ProcessPool(self._workers, _keep_counters, (self._counters,))
        todo = iter(parts)
        in_work: dict[Future, InputSplit] = {}
        while True:
            # No more than there are processes: so these are the parts that a killed one had.
            while len(in_work) < self._workers and (part := next(todo, None)) is not None:
                in_work[self._executor.submit(_work, work, part)] = part
            if not in_work:
                return
            done, _ = wait(in_work, _PERIOD, FIRST_COMPLETED)
            for future in done:
                try:
                    future.result()
                except BrokenProcessPool:
                    names = ", ".join(part.name for part in in_work.values())
                    raise PreprocessError(
                        f"a process was killed, probably for lack of memory, while these parts "
                        f"were in work: {names}; start again with fewer --workers: finished parts "
                        "are kept"
                    ) from None
                del in_work[future]
                bar.finish_part()
            bar.show()


class _Bar:
    """Parts done, samples and megabytes that the readers handed over per second."""

    def __init__(self, parts: int, verb: str, counters):
        self._counters = counters
        self._start = self._shown = time.monotonic()
        self._period = _PERIOD if sys.stderr.isatty() else _LOG_PERIOD
        self._bar = tqdm(
            total=parts, unit="part", desc=verb, mininterval=self._period, disable=not parts
        )

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        self._shown = 0.0
        self.show()
        self._bar.close()

    def finish_part(self) -> None:
        self._bar.update()

    def show(self) -> None:
        now = time.monotonic()
        if now - self._shown < self._period:
            return
        self._shown = now
        samples, size = (count / max(now - self._start, 1e-9) for count in self._counters[:2])
        self._bar.set_postfix_str(f"{samples:.0f} samples/s, {size / 1e6:.1f} MB/s read")


def _keep_counters(counters) -> None:
    global _counters
    _counters = counters


def _work(work: Work, part: InputSplit) -> None:
    _attempt(work, part, lambda item: _count(_counters, item))


def _attempt(work: Work, part: InputSplit, tick: Tick) -> None:
    try:
        with warnings.catch_warnings():
            # What Pillow finds odd in one picture of millions; what it cannot read it refuses.
            warnings.filterwarnings("ignore", module="PIL")
            work(part, tick)
    except OSError as error:
        raise PreprocessError(
            f"part {part.name}: {error}; finished parts are kept: put it right and start again"
        ) from None
    except Exception as error:
        error.add_note(f"while working on part {part.name}")
        raise


def _count(counters, item: Record | Skipped) -> None:
    if counters[2]:
        raise _StopError
    with counters.get_lock():
        counters[0] += 1
        if isinstance(item, Record):
            counters[1] += len(item.image or b"") + len(item.caption or "")
