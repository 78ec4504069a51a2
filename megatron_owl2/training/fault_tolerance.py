"""Fault tolerance: a guard against gradients that spike or are not finite, and a watchdog."""

import faulthandler
import json
import logging
import math
import os
import statistics
import sys
import threading
import time
from pathlib import Path

from megatron_owl2.config.schema import HealthConfig
from megatron_owl2.errors import DivergedError
from megatron_owl2.utils.files import truncate_jsonl

_logger = logging.getLogger(__name__)
_FILE = "skipped_steps.jsonl"
_MEMORY = 128  # gradient norms that the median is of
_LEAST = 16  # of them, before there is a median to trust
_GRACE = 10.0  # seconds for the other ranks to show their stacks before the job is torn down


class GradientSpikeGuard:
    """Guard that skips steps by their gradient norm; the same on all ranks, as the norm is.

    `state` is what a checkpoint must carry for a resumed run to judge alike.
    """

    def __init__(self, config: HealthConfig, output: Path, state: dict | None, *, writes: bool):
        self._config = config
        self._path = Path(output) / _FILE
        self._writes = writes
        self.state = state or {"norms": [], "in_a_row": 0, "skipped": 0}

    def should_apply(self, step: int, samples: range, norm: float) -> bool:
        """Whether the gradients of `step` may be applied; a refusal is written down.

        Raises DivergedError when `health.max_skipped` steps in a row were refused.
        """
        norms = self.state["norms"]
        reason = None
        if not math.isfinite(norm):
            reason = f"the gradient norm is {norm}"
        elif self._config.spike_factor and len(norms) >= _LEAST:
            limit = self._config.spike_factor * statistics.median(norms)
            if norm > limit:
                reason = f"the gradient norm {norm:.4g} is above {limit:.4g}, a spike"
        if reason is None:
            self.state["norms"] = [*norms, norm][-_MEMORY:]
            self.state["in_a_row"] = 0
            return True
        self.state["in_a_row"] += 1
        self.state["skipped"] += 1
        what = f"step {step} (samples {samples[0]} to {samples[-1]}): {reason}"
        if self._writes:
            row = {
                "step": step,
                "first_slot": samples[0],
                "last_slot": samples[-1],
                "reason": reason,
            }
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            _logger.warning("skipped %s", what)
        if self.state["in_a_row"] >= self._config.max_skipped:
            raise DivergedError(
                f"{self._config.max_skipped} steps in a row were skipped (health.max_skipped), the "
                f"last: {what}. The run can go on from its last checkpoint; with other data, a "
                "lower optimizer.lr, or another health.spike_factor"
            )
        return False


def drop_after(output: Path, step: int) -> None:
    """Drop the skipped steps that a resumed run will do again."""
    path = Path(output) / _FILE
    if path.is_file():
        truncate_jsonl(path, lambda row: row["step"] <= step)


class Watchdog:
    """Watchdog that ends this process when a step takes longer than `timeout` seconds (0: never),
    after showing where all its threads stand.

    A rank that hangs holds up all others, whose own watchdogs show their stacks in the same
    seconds, so a job leaves the stacks of all ranks in RUN/stacks.
    """

    def __init__(self, timeout: float, output: Path, rank: int):
        self._timeout, self._rank = timeout, rank
        self._file = Path(output) / "stacks" / f"rank-{rank:05d}.txt"
        self._what = "the start"
        self._deadline = time.monotonic() + timeout
        self._ended = threading.Event()
        if timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, what: str) -> None:
        """The clock starts again, for `what`."""
        self._what, self._deadline = what, time.monotonic() + self._timeout
        if self._timeout:  # for a thread that never lets this one run
            faulthandler.dump_traceback_later(self._timeout + 3 * _GRACE, exit=True)

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout / 4)):
            if time.monotonic() < self._deadline:
                continue
            message = (
                f"rank {self._rank}: {self._what} took more than {self._timeout:g} seconds "
                f"(health.step_timeout); the stacks are in {self._file}"
            )
            print(f"error: {message}", file=sys.stderr, flush=True)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("w") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            time.sleep(_GRACE)
            os._exit(1)
