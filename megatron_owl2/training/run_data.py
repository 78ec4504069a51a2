"""Data of a run: its data sets, their phases, and the order of the rows from where it stands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.data.sampling import phases
from megatron_owl2.data.sampling.phases import Phase
from megatron_owl2.data.shards.dataset import ShardedDataset, open_sources
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.data.training_order import TrainingOrder, load_packing
from megatron_owl2.errors import ConfigError
from megatron_owl2.training.checkpoint import directories
from megatron_owl2.training.from_rank_0 import from_rank_0


@dataclass(frozen=True)
class RunData:
    """Data of a run; the last of its `phases` is in force, and `order` is that of its rows.

    `progress` is what the checkpoint that the run goes on from says of it, None for a new run.
    """

    progress: dict | None
    datasets: Sequence[ShardedDataset]
    phases: list[Phase]
    order: TrainingOrder

    def describe(self) -> str:
        """The data sets, and how they are packed, for the log."""
        packed = self.order.packed
        lines = [self.phases[-1].describe(), *([] if packed is None else [packed.describe()])]
        return "\n".join(lines)

    def steps(self, config: RunConfig) -> int:
        """The steps of the whole run: `train.steps`, or those of `train.epochs`."""
        if not config.train.epochs:
            return config.train.steps
        rows = self.phases[-1].start_sample + self.order.rows(config.train.epochs)
        done, taken = (self.progress["step"], self.progress["slots"]) if self.progress else (0, 0)
        # The steps so far may have had another batch size.
        return done + max(0, -(-(rows - taken) // config.train.global_batch_size))


def open_run_data(config: RunConfig, tokenizer: Tokenizer, resumed_from: Path | None) -> RunData:
    """The data of a run that starts, or goes on from a checkpoint; all ranks together.

    Raises ConfigError if the data are not those of the checkpoint, its epochs are over, or they are
    no mixture, and what opening data sets raises.
    """
    datasets = from_rank_0(lambda: open_sources(config.data))
    packing = from_rank_0(lambda: load_packing(config, datasets, tokenizer))
    progress, directory = None, resumed_from
    if directory is None:
        found = [phases.first_phase(config.data, datasets, packing)]
    else:
        progress = from_rank_0(lambda: directories.read_progress(directory))
        where, consumed = str(directory), progress["slots"]
        found = phases.resume(progress["phases"], config.data, datasets, consumed, where, packing)
    phase, epochs = found[-1], config.train.epochs
    order = TrainingOrder(config.data, datasets, phase, packing, epochs or None)
    if progress is not None and phase.epochs != epochs:
        ended = phase.start_sample + order.rows(phase.epochs)
        if phase.epochs and progress["slots"] > ended:
            raise ConfigError(
                f"train.epochs is {epochs}, but {directory} has come to the end of its "
                f"{phase.epochs}, and the empty rows that fill its last step have the places of "
                f"the samples that would follow; say data.phase={phase.number + 1} too, and in "
                "train.epochs the number of further epochs"
            )
    found[-1] = replace(phase, epochs=epochs)
    return RunData(progress, datasets, found, order)
