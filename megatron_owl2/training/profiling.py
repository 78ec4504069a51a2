"""Profiling of the named spans of a step, by torch or Nsight Systems."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_owl2.config.schema import WatchConfig
from megatron_owl2.mcore import setup
from megatron_owl2.training.metrics.straggler import CudaTimer


class Profiler:
    """Profiler of `profile_steps` steps from `profile_step` on, which this process counts from 1.

    torch: a trace for chrome://tracing or Perfetto, RUN/profile/rank-<rank>.json.gz, of each rank
    that `records`. nsys: the range that `nsys profile --capture-range=cudaProfilerApi` waits for,
    on every rank, with NVTX ranges in it.
    """

    def __init__(self, config: WatchConfig, output: Path, *, records: bool):
        self._kind = "none" if config.profiler == "torch" and not records else config.profiler
        self._first, self._last = (
            config.profile_step,
            config.profile_step + config.profile_steps - 1,
        )
        rank = torch.distributed.get_rank()
        self._path = Path(output) / "profile" / f"rank-{rank:05d}.json.gz"
        self._steps = 0
        self._profile: torch.profiler.profile | None = None
        self._active = False
        self._open: list[torch.profiler.record_function] = []

    def begin_step(self, step: int) -> None:
        """A step begins; `step` is its number in the run."""
        self._steps += 1
        if self._kind != "none" and self._steps == self._first:
            self._start()
        self.begin(f"step {step}")

    def end_step(self) -> None:
        """The step has ended, all that belongs to it included."""
        self.end()
        if self._active and self._steps == self._last:
            self.close()

    def begin(self, name: str) -> None:
        """A span begins, inside of those that are open."""
        if not self._active:
            return
        if self._kind == "nsys":
            torch.cuda.nvtx.range_push(name)
        else:
            self._open.append(torch.profiler.record_function(name))
            self._open[-1].__enter__()

    def end(self) -> None:
        """The span that began last ends."""
        if not self._active:
            return
        if self._kind == "nsys":
            torch.cuda.nvtx.range_pop()
        else:
            self._open.pop().__exit__(None, None, None)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Context of a named span."""
        self.begin(name)
        yield
        self.end()

    def close(self) -> None:
        """Stop, and write what was profiled; a run may end before its last step to be profiled."""
        if not self._active:
            return
        self._active = False
        if self._kind == "nsys":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            return
        assert self._profile is not None
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None  # holds every event

    def _start(self) -> None:
        self._active = True
        if self._kind == "nsys":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if not setup.on_cpu():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()


class Timers:
    """Timers in megatron-core's sense (`TransformerConfig.timers`), which tell the profiler of
    every span of its schedules; `backward` is the time of the backward passes."""

    def __init__(self, profiler: Profiler):
        self._profiler = profiler
        self.backward = CudaTimer()

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        return _Timer(name, self._profiler, self.backward if name == _BACKWARD else None)


_BACKWARD = "backward-compute"  # megatron-core, pipeline_parallel/schedules.py


class _Timer:
    """megatron-core's interface of a timer; its barrier, which would slow the run, is left out."""

    def __init__(self, name: str, profiler: Profiler, timer: CudaTimer | None):
        self._name, self._profiler, self._timer = name, profiler, timer

    def start(self, barrier: bool = False) -> None:
        self._profiler.begin(self._name)
        if self._timer is not None:
            self._timer.start()

    def stop(self, barrier: bool = False) -> None:
        if self._timer is not None:
            self._timer.stop()
        self._profiler.end()
