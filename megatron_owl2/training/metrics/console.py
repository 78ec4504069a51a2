"""The line that a run prints for every interval."""

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.training.metrics.accumulator import OF_THE_RUN


def format_console_line(row: dict, config: RunConfig, first_step: int) -> str:
    """What a person wants to see of a row of metrics.jsonl, and the time that is left at the pace
    since `first_step`, where this process began."""
    done, total = row["step"], config.train.steps
    pace = row["seconds"] / (done - first_step)
    parts = [
        f"{config.stage.name} {done:>{len(str(total))}}/{total}",
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
        *([f"MFU {row['mfu']:.1%}"] if row["mfu"] is not None else []),
        f"data wait {row['data_wait_share']:.0%}",
    ]
    counted = (*OF_THE_RUN, "skipped_steps")
    parts += [f"{name.replace('_', ' ')} {row[name]}" for name in counted if row[name]]
    parts.append(f"{_clock((total - done) * pace)} left")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
