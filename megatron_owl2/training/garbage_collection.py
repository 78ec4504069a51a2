"""Collection of Python's garbage at steps that all ranks share."""

import gc
from types import TracebackType

FULL_INTERVAL = 100  # steps between two collections of everything


class GarbageCollection:
    """Context of collection by step, instead of by Python's own count of objects.

    By that count every rank would collect at another moment, when all the others wait for it.
    """

    def __enter__(self) -> "GarbageCollection":
        self._enabled = gc.isenabled()
        gc.disable()
        return self

    def collect(self, step: int) -> None:
        """Collect after `step`: what is young at each, everything now and then."""
        gc.collect(2 if step % FULL_INTERVAL == 0 else 1)

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._enabled:
            gc.enable()
