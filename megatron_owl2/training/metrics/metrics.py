"""What a run tells: one JSON line per interval in `metrics.jsonl`, wandb if asked, a progress line.

Numbers are gathered on the device and put together over the ranks once per interval.
"""

import json
import time
from collections import Counter
from pathlib import Path

import torch

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.model.flops import Load, training_flops
from megatron_owl2.training.metrics import device
from megatron_owl2.training.metrics.accumulator import OF_THE_RUN, MetricAccumulator, bad, seen
from megatron_owl2.training.metrics.console import format_console_line
from megatron_owl2.training.metrics.straggler import REPORT_RATIO, StragglerDetector
from megatron_owl2.training.metrics.wandb_logger import WandbLogger
from megatron_owl2.utils.files import truncate_jsonl


class Metrics:
    """Collects the steps of an interval; rank 0 writes.

    `counts` are those of the run so far, `sources` the data sets of the phase, `trained` the
    names of the parameters that train, `stage` this rank's place in the pipeline. All ranks make
    one together.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        tracker: WandbLogger,
        *,
        start_step: int,
        counts: dict,
        sources: list[dict],
        trained: set[str],
        stage: int,
    ):
        self._config, self._tracker = config, tracker
        self._path = Path(config.train.output) / "metrics.jsonl"
        self._main = torch.distributed.get_rank() == 0
        self._ranks = torch.distributed.get_world_size()
        parallel = config.parallel
        self._model_ranks = parallel.tensor * parallel.pipeline * parallel.context
        self._sources, self._trained = sources, trained
        self._counts = MetricAccumulator(len(sources), self._model_ranks, device, counts)
        self._peers = StragglerDetector(stage)
        self._peak = device.peak_tflops(config.watch.peak_tflops)
        self._own = torch.zeros(2, dtype=torch.float64)  # seconds of waiting and of computing
        self._first_step = self._step = start_step
        self._started = self._interval_started = time.perf_counter()

    @property
    def counts(self) -> dict:
        """Of the whole run, for its checkpoints; complete after `write`."""
        return self._counts.run

    def add(self, sums: torch.Tensor, counts: Counter, computed: float) -> None:
        """Count one step of this rank: its SUMS, what its data were by name, and the seconds of
        its backward passes."""
        self._counts.add(sums, counts)
        self._own += torch.tensor([counts["wait_seconds"], computed])

    def write(
        self,
        step: int,
        *,
        grad_norm: float,
        part_norms: dict[str, float],
        rates: dict[str, float],
        skipped: int,
    ) -> None:
        """Report the steps since the last call; all ranks together.

        Norms and rates are those of `step`, `skipped` the steps of the run that were not applied.
        """
        totals = self._counts.take()
        waited, computed, *memory = self._by_rank()
        now = time.perf_counter()
        seconds, steps = now - self._interval_started, step - self._step
        self._interval_started, self._step = now, step
        slowest = self._peers.slowest(waited, computed)
        samples = steps * self._config.train.global_batch_size
        text = {k: totals[k] - totals[f"image_{k}"] for k in ("loss", "targets")}
        row = {
            "step": step,
            "loss": _ratio(totals["loss"], totals["targets"]),
            "image_loss": _ratio(totals["image_loss"], totals["image_targets"]),
            "text_loss": _ratio(text["loss"], text["targets"]),
            "grad_norm": grad_norm,
            "grad_norms": part_norms,
            "lr": max(rates.values()),
            "rates": rates,
            "samples_per_second": samples / seconds,
            **self._speed(totals, seconds),
            **self._reading(totals, seconds, samples),
            "memory_gib": dict(zip(device.MEMORY, map(max, memory), strict=True)),
            "slowest_rank": slowest.rank,
            "slowest_host": slowest.host,
            "slowest_ratio": slowest.ratio,
            **{name: self.counts[name] for name in OF_THE_RUN},
            "skipped_steps": skipped,
            "sources": [self._source(index) for index in range(len(self._sources))],
            "seconds": now - self._started,
        }
        if not self._main:
            return
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(format_console_line(row, self._config, self._first_step), flush=True)
        if slowest.ratio >= REPORT_RATIO:
            print(f"straggler: {slowest}", flush=True)
        self._tracker.log(row, step)

    def _by_rank(self) -> list[list[float]]:
        """Seconds of waiting and of computing, then memory, each as a list over the ranks."""
        mine = torch.tensor([*self._own.tolist(), *device.take_peak_memory()])
        self._own.zero_()
        mine = mine.to(self._counts.device)
        every = [torch.empty_like(mine) for _ in range(self._ranks)]
        torch.distributed.all_gather(every, mine)
        return torch.stack(every).t().tolist()

    def _speed(self, totals: dict, seconds: float) -> dict:
        """Work per second, by the mathematics of the model; padding is no work."""
        images = totals["vision_tokens"] / self._config.model.tokens_per_image
        load = Load(
            images=round(images),
            tokens=round(totals["tokens"]),
            vision_tokens=round(totals["vision_tokens"]),
            pairs=round(totals["pairs"]),
        )
        operations = sum(training_flops(self._config.model, load, self._trained).values())
        tflops = operations / seconds / self._ranks / 1e12
        return {
            "images_per_second": images / seconds,
            "tokens_per_second": totals["tokens"] / seconds,
            "tflops_per_device": tflops,
            "mfu": tflops / self._peak if self._peak else None,
        }

    def _reading(self, totals: dict, seconds: float, samples: int) -> dict:
        read = samples * self._model_ranks  # every rank reads for itself
        return {
            "data_wait_share": totals["wait_seconds"] / self._ranks / seconds,
            "data_megabytes_per_second": totals["bytes"] / seconds / 1e6,
            "read_milliseconds": totals["read_seconds"] / read * 1e3,
            "decode_milliseconds": totals["decode_seconds"] / read * 1e3,
        }

    def _source(self, index: int) -> dict:
        """How much of a data set was seen, in samples and in epochs, and how much was bad."""
        source, sample_indices = self._sources[index], self.counts[seen(index)]
        return {
            "path": source["path"],
            "seen": sample_indices,
            "epochs": sample_indices / source["samples"],
            "bad": self.counts[bad(index)],
        }


def drop_after(output: Path, step: int) -> None:
    """Forget rows of steps that a resumed run will do again."""
    path = Path(output) / "metrics.jsonl"
    if path.is_file():
        truncate_jsonl(path, lambda row: row["step"] <= step)


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
