"""wandb logger, beside metrics.jsonl."""

from pathlib import Path
from typing import Any

from megatron_owl2.config.load import to_dict
from megatron_owl2.config.schema import RunConfig

_ID = "wandb_id"  # file of the run directory


class WandbLogger:
    """Logger of rows and images to wandb, if `wandb.enabled` and this rank writes; else nothing.

    A run that goes on is the same run there, by the id in RUN/wandb_id.
    """

    def __init__(self, config: RunConfig, *, writes: bool):
        self._wandb: Any = None
        self._run: Any = None
        if not (config.wandb.enabled and writes):
            return
        import wandb

        output = Path(config.train.output)
        known = output / _ID
        self._wandb = wandb
        self._run = wandb.init(
            project=config.wandb.project,
            mode=config.wandb.mode,
            dir=output,
            name=f"{output.name}-{config.stage.name}",
            config=to_dict(config),
            id=known.read_text() if known.is_file() else None,
            # Without a network there is nothing to ask; `wandb sync` joins what has the same id.
            resume="allow" if config.wandb.mode == "online" else None,
        )
        known.write_text(self._run.id)

    def log(self, row: dict, step: int) -> None:
        """Log a row of metrics.jsonl; what is nested is named section/name."""
        if self._run is not None:
            self._run.log(flat(row), step=step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Log an image from its file."""
        if self._run is not None:
            self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self, *, failed: bool = False) -> None:
        """Write what is not written yet; `failed` marks the run as crashed."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))


def flat(row: dict) -> dict:
    """The numbers and strings of a row with nested dicts and lists, by the path to each."""
    found = {}
    for name, value in row.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": v for inner, v in flat(value).items()}
        else:
            found[str(name)] = value
    return found
