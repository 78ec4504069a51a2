"""What a run tells: one JSON line per interval in `metrics.jsonl`, wandb if asked, a progress line.

Numbers are gathered on the device and summed over the ranks once per interval.
"""

import json
import os
import time
from pathlib import Path

import torch

from megatron_owl2.config import RunConfig, to_dict
from megatron_owl2.training.step import SUMS

# Of one step on one rank.
DATA_COUNTS = ("tokens", "bad_samples", "shortened_samples", "wait_seconds")
_COUNTERS = (*SUMS, *DATA_COUNTS)


class Metrics:
    """Collects the steps of an interval; rank 0 writes."""

    def __init__(self, config: RunConfig, device: torch.device, start_step: int, counts: dict):
        self.config = config
        self.output = Path(config.train.output)
        self.main = torch.distributed.get_rank() == 0
        self.ranks = torch.distributed.get_world_size()
        self.model_ranks = config.parallel.tensor * config.parallel.pipeline
        self.totals = torch.zeros(len(_COUNTERS), dtype=torch.float64, device=device)
        self.counts = {"bad_samples": 0, "shortened_samples": 0, **counts}  # of the whole run
        self.first_step = self.step = start_step
        self.started = self.interval_started = time.perf_counter()
        self.wandb = self._open_wandb() if config.wandb.enabled and self.main else None

    def add(self, sums: torch.Tensor, counts: dict) -> None:
        """Count one step of this rank: its SUMS and its DATA_COUNTS by name."""
        self.totals[: len(SUMS)] += sums
        data = [counts[name] for name in DATA_COUNTS]
        self.totals[len(SUMS) :] += torch.tensor(
            data, dtype=torch.float64, device=self.totals.device
        )

    def write(self, step: int, grad_norm: float, lr: float) -> None:
        """Sum over the ranks and report the steps since the last call; all ranks together."""
        torch.distributed.all_reduce(self.totals)
        sums = dict(zip(_COUNTERS, self.totals.tolist(), strict=True))
        self.totals.zero_()
        now = time.perf_counter()
        seconds, steps = now - self.interval_started, step - self.step
        self.interval_started, self.step = now, step
        for name in self.counts:
            self.counts[name] += round(sums[name] / self.model_ranks)
        text = {k: sums[k] - sums[f"image_{k}"] for k in ("loss", "targets")}
        row = {
            "step": step,
            "loss": _ratio(sums["loss"], sums["targets"]),
            "image_loss": _ratio(sums["image_loss"], sums["image_targets"]),
            "text_loss": _ratio(text["loss"], text["targets"]),
            "grad_norm": grad_norm,
            "lr": lr,
            "samples_per_second": steps * self.config.train.global_batch_size / seconds,
            "tokens_per_second": sums["tokens"] / self.model_ranks / seconds,
            "data_wait_share": sums["wait_seconds"] / self.ranks / seconds,
            **self.counts,
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
        parts += [f"{n.replace('_', ' ')} {count}" for n, count in self.counts.items() if count]
        parts.append(f"{_clock((total - done) * pace)} left")
        return "  ".join(parts)

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
        lines = path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a crash may have torn the last
        kept = path.with_name(".metrics.partial")
        kept.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        os.replace(kept, path)


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
