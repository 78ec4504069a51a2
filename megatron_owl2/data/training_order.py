"""Order of the rows of a run: which samples each row of each batch holds."""

from collections.abc import Sequence

from megatron_owl2.config.schema import DataConfig, RunConfig
from megatron_owl2.data.lengths import load_lengths
from megatron_owl2.data.sampling.packed_order import PackedOrder, Packing
from megatron_owl2.data.sampling.phases import Phase, order_seed, source_weights
from megatron_owl2.data.sampling.shuffle import ShuffleOrder
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import ConfigError


def load_packing(
    config: RunConfig, datasets: Sequence[ShardedDataset], tokenizer: Tokenizer
) -> Packing | None:
    """The packing of a run, None if it has none; raises what load_lengths does."""
    if not config.data.packing:
        return None
    template = config.model.conversation
    return Packing(
        lengths=[load_lengths(dataset, tokenizer, template) for dataset in datasets],
        tokens_per_image=config.model.tokens_per_image,
        row_length=config.data.sequence_length,
        images_per_row=config.data.images_per_row,
        group=config.train.global_batch_size,
    )


class TrainingOrder:
    """Order of the rows of a phase, by their index in the run; a row is one sample without
    `packing`. Behind `epochs` of the phase, if given, rows are empty. Raises ConfigError for an
    impossible mixture."""

    def __init__(
        self,
        config: DataConfig,
        datasets: Sequence[ShardedDataset],
        phase: Phase,
        packing: Packing | None = None,
        epochs: int | None = None,
    ):
        sizes = [dataset.sizes for dataset in datasets]
        weights = source_weights(config, datasets)
        try:
            self.samples = ShuffleOrder(sizes, weights, order_seed(config.seed, phase.number))
        except ValueError as error:
            raise ConfigError(f"data.sources: {error}") from None
        self.first = phase.start_sample  # index of the first row
        self._epochs = epochs
        group = phase.group
        self.packed = packing and PackedOrder(self.samples, packing, sizes, group, epochs)

    def rows(self, epochs: int) -> int:
        """Number of rows of the first epochs of the phase."""
        if self.packed is not None:
            return self.packed.rows_before(epochs)
        return epochs * self.samples.samples_per_epoch

    def row(self, row_index: int) -> tuple[int, ...]:
        """The indices in `samples` of a row's samples."""
        index = row_index - self.first
        if self.packed is not None:
            return self.packed.row(index).sample_indices
        if self._epochs is not None and index >= self._epochs * self.samples.samples_per_epoch:
            return ()
        return (index,)
