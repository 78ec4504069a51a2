"""Metrics of a run: one JSON line per interval in metrics.jsonl, wandb, the console.

Numbers are gathered on the device and put together over the ranks once per interval.
"""

import json
import logging
import time
from collections import Counter
from pathlib import Path

import torch

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.model.flops import Load, training_flops
from megatron_owl2.training.metrics.accumulator import MetricAccumulator, bad, mean_losses, seen
from megatron_owl2.training.metrics.balance import RankBalance
from megatron_owl2.training.metrics.console import format_console_line
from megatron_owl2.training.metrics.device import DeviceMemoryMonitor, peak_tflops
from megatron_owl2.training.metrics.loader_metrics import LOADER_METRICS, Interval
from megatron_owl2.training.metrics.straggler import REPORT_RATIO, StragglerDetector
from megatron_owl2.training.metrics.wandb_logger import WandbLogger
from megatron_owl2.utils.files import truncate_jsonl

_logger = logging.getLogger(__name__)


class Metrics:
    """Metrics of the steps of an interval; rank 0 writes them.

    `run_totals` are the counts of the run so far, `sources` the data sets of the phase, `trained`
    the names of the parameters that train, `pipeline_rank` this rank's. All ranks make one
    together.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        wandb_logger: WandbLogger,
        *,
        start_step: int,
        run_totals: dict[str, int],
        sources: list[dict],
        trained: set[str],
        pipeline_rank: int,
    ):
        self._config, self._wandb = config, wandb_logger
        self._path = Path(config.train.output) / "metrics.jsonl"
        self._main = torch.distributed.get_rank() == 0
        self._ranks = torch.distributed.get_world_size()
        parallel = config.parallel
        self._model_ranks = parallel.tensor * parallel.pipeline * parallel.context
        self._sources, self._trained = sources, trained
        self._accumulator = MetricAccumulator(len(sources), self._model_ranks, device, run_totals)
        self._stragglers = StragglerDetector(pipeline_rank)
        self._balance = RankBalance(config.model.tokens_per_image, device)
        self._memory = DeviceMemoryMonitor()
        self._peak = peak_tflops(config.watch.peak_tflops)
        self._own = torch.zeros(2, dtype=torch.float64)  # seconds of waiting and of computing
        self._first_step = start_step
        self._started = self._interval_started = time.perf_counter()

    @property
    def run_totals(self) -> dict[str, int]:
        """Counts of the whole run, for its checkpoints; complete after `write`."""
        return self._accumulator.run_totals

    def add(self, sums: torch.Tensor, counts: Counter[str], backward_seconds: float) -> None:
        """Count one step of this rank: its SUMS, the counts of its micro-batches, and the seconds
        of its backward passes."""
        self._accumulator.add(sums, counts)
        self._own += torch.tensor([counts["wait_seconds"], backward_seconds])
        self._balance.add(counts)

    def exclude(self, seconds: float) -> None:
        """Leave seconds, such as those of a validation, out of the interval's speed."""
        self._interval_started += seconds

    def write(
        self,
        step: int,
        *,
        grad_norm: float,
        grad_norms: dict[str, float],
        rates: dict[str, float],
        skipped: int,
        validation: list[dict] | None = None,
    ) -> None:
        """Report the steps since the last call; all ranks together.

        Norms and rates are those of `step`, `skipped` the steps of the run that were not applied,
        `validation` what Validator found after `step`, if it ran.
        """
        totals = self._accumulator.take()
        waited, computed, *memory = self._by_rank()
        now = time.perf_counter()
        seconds, self._interval_started = now - self._interval_started, now
        slowest = self._stragglers.slowest(waited, computed)
        samples = totals["samples"]
        reads = round(samples * self._model_ranks)
        interval = Interval(seconds, reads, self._ranks, tokens=totals["tokens"])
        row = {
            "step": step,
            **mean_losses(totals),
            **({} if validation is None else {"validation": validation}),
            "grad_norm": grad_norm,
            "grad_norms": grad_norms,
            "lr": max(rates.values()),
            "rates": rates,
            "samples_per_second": samples / seconds,
            **self._speed(totals, seconds),
            **self._balance.take(),
            **{
                metric.reported_as: metric.report(totals[metric.name], interval)
                for metric in LOADER_METRICS
                if metric.reported_as is not None
            },
            "memory_gib": dict(zip(self._memory.names, map(max, memory), strict=True)),
            "slowest_rank": slowest.rank,
            "slowest_host": slowest.host,
            "slowest_ratio": slowest.ratio,
            **{m.name: self.run_totals[m.name] for m in LOADER_METRICS if m.over_run},
            "skipped_steps": skipped,
            "sources": [self._source(index) for index in range(len(self._sources))],
            "seconds": now - self._started,
        }
        if not self._main:
            return
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")
        _logger.info("%s", format_console_line(row, self._config, self._first_step))
        if slowest.ratio >= REPORT_RATIO:
            _logger.info("straggler: %s", slowest)
        self._wandb.log(row, step)

    def _by_rank(self) -> list[list[float]]:
        """Seconds of waiting and of computing, then memory, each as a list over the ranks."""
        mine = torch.tensor([*self._own.tolist(), *self._memory.take_peak()])
        self._own.zero_()
        mine = mine.to(self._accumulator.device)
        every = [torch.empty_like(mine) for _ in range(self._ranks)]
        torch.distributed.all_gather(every, mine)
        return torch.stack(every).t().tolist()

    def _speed(self, totals: dict[str, float], seconds: float) -> dict[str, float | None]:
        """Work per second, by the mathematics of the model; padding is no work."""
        images = totals["vision_tokens"] / self._config.model.tokens_per_image
        load = Load(
            images=round(images),
            tokens=round(totals["tokens"]),
            vision_tokens=round(totals["vision_tokens"]),
            targets=round(totals["target_tokens"]),
            pairs=round(totals["pairs"]),
        )
        config = self._config
        found = training_flops(config.model, load, self._trained, config.stage.lora)
        operations = sum(found.values())
        tflops = operations / seconds / self._ranks / 1e12
        return {
            "images_per_second": images / seconds,
            "tflops_per_device": tflops,
            "mfu": tflops / self._peak if self._peak else None,
        }

    def _source(self, index: int) -> dict:
        """Counts of a data set: samples and epochs seen, bad samples."""
        source, samples = self._sources[index], self.run_totals[seen(index)]
        return {
            "path": source["path"],
            "seen": samples,
            "epochs": samples / source["samples"],
            "bad": self.run_totals[bad(index)],
        }


def drop_after(output: Path, step: int) -> None:
    """Drop the rows of steps that a resumed run will do again."""
    path = Path(output) / "metrics.jsonl"
    if path.is_file():
        truncate_jsonl(path, lambda row: row["step"] <= step)
