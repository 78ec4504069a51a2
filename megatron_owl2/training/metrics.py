"""What a run tells: one JSON line per interval in `metrics.jsonl`, wandb if asked, a progress line.

Numbers are gathered on the device and summed over the ranks once per interval.
"""

import json
import time
from collections import Counter
from pathlib import Path

import torch

from megatron_owl2.config import RunConfig, to_dict
from megatron_owl2.files import keep_lines
from megatron_owl2.training.step import SUMS

# Of one step on one rank; seen(i) and bad(i) for every data set beside them.
_DATA_COUNTS = (
    "tokens",
    "wait_seconds",
    "bytes",
    "read_seconds",
    "decode_seconds",
    "bad_samples",
    "shortened_samples",
    "read_retries",
    "worker_restarts",
)
_OF_THE_RUN = ("bad_samples", "shortened_samples", "read_retries", "worker_restarts")
_OF_A_PROCESS = ("read_retries", "worker_restarts")


def seen(source: int) -> str:
    """Name of the count of slots that a data set filled."""
    return f"seen/{source}"


def bad(source: int) -> str:
    """Name of the count of unusable samples of a data set."""
    return f"bad/{source}"


def without_sources(counts: dict) -> dict:
    """The counts of a run that goes on with other data sets."""
    return {name: count for name, count in counts.items() if name in _OF_THE_RUN}


class Metrics:
    """Collects the steps of an interval; rank 0 writes. `sources` are those of the phase."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        start_step: int,
        counts: dict,
        sources: list[dict],
    ):
        self.config = config
        self.output = Path(config.train.output)
        self.main = torch.distributed.get_rank() == 0
        self.ranks = torch.distributed.get_world_size()
        parallel = config.parallel
        self.model_ranks = parallel.tensor * parallel.pipeline * parallel.context
        self.sources = sources
        by_source = [name(index) for name in (seen, bad) for index in range(len(sources))]
        self.counters = (*SUMS, *_DATA_COUNTS, *by_source)
        self.totals = torch.zeros(len(self.counters), dtype=torch.float64, device=device)
        self.counts = dict.fromkeys((*_OF_THE_RUN, *by_source), 0) | counts  # of the whole run
        self.first_step = self.step = start_step
        self.started = self.interval_started = time.perf_counter()
        self.wandb = self._open_wandb() if config.wandb.enabled and self.main else None

    def add(self, sums: torch.Tensor, counts: Counter) -> None:
        """Count one step of this rank: its SUMS, and what its data were by name."""
        self.totals[: len(SUMS)] += sums
        data = [counts[name] for name in self.counters[len(SUMS) :]]
        self.totals[len(SUMS) :] += torch.tensor(
            data, dtype=torch.float64, device=self.totals.device
        )

    def write(self, step: int, grad_norm: float, lr: float) -> None:
        """Sum over the ranks and report the steps since the last call; all ranks together."""
        torch.distributed.all_reduce(self.totals)
        sums = dict(zip(self.counters, self.totals.tolist(), strict=True))
        self.totals.zero_()
        now = time.perf_counter()
        seconds, steps = now - self.interval_started, step - self.step
        self.interval_started, self.step = now, step
        for name in self.counts:  # every model-parallel rank reads the same data by itself
            alike = 1 if name in _OF_A_PROCESS else self.model_ranks
            self.counts[name] += round(sums[name] / alike)
        samples = steps * self.config.train.global_batch_size
        read = samples * self.model_ranks  # every rank reads for itself
        text = {k: sums[k] - sums[f"image_{k}"] for k in ("loss", "targets")}
        row = {
            "step": step,
            "loss": _ratio(sums["loss"], sums["targets"]),
            "image_loss": _ratio(sums["image_loss"], sums["image_targets"]),
            "text_loss": _ratio(text["loss"], text["targets"]),
            "grad_norm": grad_norm,
            "lr": lr,
            "samples_per_second": samples / seconds,
            "tokens_per_second": sums["tokens"] / self.model_ranks / seconds,
            "data_wait_share": sums["wait_seconds"] / self.ranks / seconds,
            "data_megabytes_per_second": sums["bytes"] / seconds / 1e6,
            "read_milliseconds": sums["read_seconds"] / read * 1e3,
            "decode_milliseconds": sums["decode_seconds"] / read * 1e3,
            **{name: self.counts[name] for name in _OF_THE_RUN},
            "sources": [self._source(index) for index in range(len(self.sources))],
            "seconds": now - self.started,
        }
        if self.main:
            with open(self.output / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            print(self._line(row), flush=True)
            if self.wandb is not None:
                self.wandb.log(row, step=step)

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()

    def _line(self, row: dict) -> str:
        done, total = row["step"], self.config.train.steps
        pace = row["seconds"] / (done - self.first_step)
        parts = [
            f"{self.config.stage.name} {done:>{len(str(total))}}/{total}",
            f"loss {row['loss']:.4f}",
            *(
                f"{kind} {row[f'{kind}_loss']:.4f}"
                for kind in ("image", "text")
                if row["image_loss"] is not None and row["text_loss"] is not None
            ),
            f"grad norm {row['grad_norm']:.3f}",
            f"lr {row['lr']:.2e}",
            f"{row['samples_per_second']:,.0f} samples/s",
            f"{row['tokens_per_second']:,.0f} tokens/s",
            f"data wait {row['data_wait_share']:.0%}",
        ]
        parts += [f"{n.replace('_', ' ')} {row[n]}" for n in _OF_THE_RUN if row[n]]
        parts.append(f"{_clock((total - done) * pace)} left")
        return "  ".join(parts)

    def _source(self, index: int) -> dict:
        """How much of a data set was seen, in samples and in epochs, and how much was bad."""
        source, slots = self.sources[index], self.counts[seen(index)]
        return {
            "path": source["path"],
            "seen": slots,
            "epochs": slots / source["samples"],
            "bad": self.counts[bad(index)],
        }

    def _open_wandb(self):
        import wandb

        return wandb.init(
            project=self.config.wandb.project,
            mode=self.config.wandb.mode,
            dir=self.output,
            name=f"{self.output.name}-{self.config.stage.name}",
            config=to_dict(self.config),
        )


def drop_after(output: Path, step: int) -> None:
    """Forget rows of steps that a resumed run will do again."""
    path = Path(output) / "metrics.jsonl"
    if path.is_file():
        keep_lines(path, lambda row: row["step"] <= step)


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
