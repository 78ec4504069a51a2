"""Order of the rows of a run: which samples each row of each batch holds."""

from collections.abc import Sequence

from megatron_owl2.config.schema import DataConfig, RunConfig
from megatron_owl2.data.lengths import load_lengths
from megatron_owl2.data.sampling.grouped_order import GroupedOrder, SampleGroup, SampleOrder
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
            self.samples = _order(config, sizes, weights, order_seed(config.seed, phase.number))
        except ValueError as error:
            raise ConfigError(f"data.sources: {error}") from None
        self.first = phase.start_sample  # index of the first row
        self._epochs = epochs
        self.packed: PackedOrder | None = None
        if packing is not None:
            assert isinstance(self.samples, ShuffleOrder)  # check_groups: no groups beside packing
            self.packed = PackedOrder(self.samples, packing, sizes, phase.group, epochs)

    def rows(self, epochs: int) -> int:
        """Number of rows of the first epochs of the phase."""
        if self.packed is not None:
            return self.packed.rows_before(epochs)
        assert isinstance(self.samples, ShuffleOrder)  # check_groups: each group has its own epochs
        return epochs * self.samples.samples_per_epoch

    def row(self, row_index: int) -> tuple[int, ...]:
        """The indices in `samples` of a row's samples."""
        index = row_index - self.first
        if self.packed is not None:
            return self.packed.row(index).sample_indices
        if self._epochs is not None and index >= self.rows(self._epochs):
            return ()
        return (index,)


def _order(
    config: DataConfig, sizes: list[list[int]], weights: list[float], seed: int
) -> SampleOrder:
    """The order of the samples of all sources, or of each group of `config.groups`."""
    if not config.groups:
        return ShuffleOrder(sizes, weights, seed)
    groups = []
    for name, per_batch in config.groups.items():
        members = [i for i, source in enumerate(config.sources) if source.group == name]
        of_members = tuple(weights[i] for i in members)
        groups.append(SampleGroup(name, tuple(members), of_members, per_batch))
    return GroupedOrder(sizes, groups, seed)
