"""Console line of a run for every interval."""

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.training.metrics.loader_metrics import LOADER_METRICS


def format_console_line(row: dict, config: RunConfig, first_step: int) -> str:
    """The numbers of a row of metrics.jsonl that a person looks at, and the time left.

    The time left is at the speed since `first_step`, where this process began.
    """
    done, total = row["step"], config.train.steps
    seconds_per_step = row["seconds"] / (done - first_step)
    parts = [
        f"{config.stage.name} {done:>{len(str(total))}}/{total}",
        "loss -" if row["loss"] is None else f"loss {row['loss']:.4f}",
        *(
            f"{kind} {row[f'{kind}_loss']:.4f}"
            for kind in ("image", "text")
            if row["image_loss"] is not None and row["text_loss"] is not None
        ),
        *(
            f"validation {source['name']} {source['loss']:.4f}"
            for source in row.get("validation", ())
            if source["loss"] is not None
        ),
        f"grad norm {row['grad_norm']:.3f}",
        f"lr {row['lr']:.2e}",
        f"{row['samples_per_second']:,.0f} samples/s",
        f"{row['tokens_per_second']:,.0f} tokens/s",
        *([f"MFU {row['mfu']:.1%}"] if row["mfu"] is not None else []),
        f"padding {row['padding_share']:.0%}",
        f"data wait {row['data_wait_share']:.0%}",
    ]
    counted = [metric.name for metric in LOADER_METRICS if metric.over_run]
    counted.append("skipped_steps")
    parts += [f"{name.replace('_', ' ')} {row[name]}" for name in counted if row[name]]
    parts.append(f"{_clock((total - done) * seconds_per_step)} left")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
