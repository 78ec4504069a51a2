"""Provenance of a checkpoint: the training stages it went through, and the data of each."""

from dataclasses import dataclass
from pathlib import Path

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.errors import CheckpointError, ConfigError
from megatron_owl2.training.checkpoint import directories


@dataclass(frozen=True)
class TrainedStage:
    """A training stage with its resolved configuration, its last step, and the sources of all its
    data phases, each with the path, weight and samples that the phase recorded."""

    config: RunConfig
    step: int
    sources: list[dict]


def trained_stages(checkpoint: str | Path) -> list[TrainedStage]:
    """The stages of a checkpoint, first to last, as far back as the checkpoints are still there.

    Converted weights have none. Raises CheckpointError or ConfigError for the checkpoint itself
    only: what lies before it may have been moved, removed or replaced.
    """
    directory = directories.resolve(checkpoint)
    stages, seen = [_stage(directory)], {directory}
    while stages[0] is not None and (before := stages[0].config.stage.initial_checkpoint):
        try:
            directory = directories.resolve(before)
            if directory in seen:  # a run that was made again in the place of its start
                break
            stages.insert(0, _stage(directory))
        except (CheckpointError, ConfigError, OSError):
            break
        seen.add(directory)
    return [stage for stage in stages if stage is not None]


def _stage(directory: Path) -> TrainedStage | None:
    if (directory / "progress.json").read_bytes().strip() == b"{}":
        return None
    progress = directories.read_progress(directory)
    sources = [source for phase in progress.get("phases", []) for source in phase["sources"]]
    return TrainedStage(directories.read_config(directory), progress["step"], sources)
