"""Samples as training makes them, of a data set or of a run's rows, for people to read."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_owl2.config.require import require
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.config.validate import check_groups
from megatron_owl2.data.batch import BadSample
from megatron_owl2.data.conversation import Sample
from megatron_owl2.data.row_length import row_alignment
from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.data.sampling import phases
from megatron_owl2.data.shards.dataset import ShardedDataset, open_sources
from megatron_owl2.data.spans import Span, spans_of
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.data.training_dataset import TrainingDataset
from megatron_owl2.data.training_order import TrainingOrder, load_packing
from megatron_owl2.errors import BadSampleError, DataError


@dataclass(frozen=True)
class ShownSample:
    """A sample with its spans, and the data set and corpus that it comes from."""

    sample: Sample
    spans: list[Span]
    source: str

    @property
    def supervised(self) -> int:
        """Number of tokens that are learnt."""
        return sum(len(span.ids) for span in self.spans if span.kind == "learnt")


@dataclass(frozen=True)
class ShownRow:
    """Samples under one title, and those that could not be used in their place."""

    title: str
    samples: list[ShownSample]
    bad: list[BadSample]


def samples_of_dataset(
    dataset: ShardedDataset,
    config: RunConfig,
    tokenizer: Tokenizer,
    indices: Sequence[int],
    keys: Sequence[str],
) -> Iterator[ShownRow]:
    """The samples at `indices` (negative from the end) and with `keys`, alone and not augmented.

    Keys are looked for from the first sample on. Raises DataError if there is no such sample and
    BadSampleError if it cannot be used.
    """
    builder = SampleBuilder.of(config, tokenizer)
    wanted = [_checked(dataset, index) for index in indices]
    for index in [*wanted, *_indices_of(dataset, keys)]:
        record = dataset[index]
        sample = builder.build(record, defaultdict(float))
        source = f"{dataset.location}, from {record.source!r}" if record.source else None
        shown = _shown(sample, config, tokenizer, source or dataset.location)
        yield ShownRow(f"sample {index}", [shown], [])


def rows_of_run(
    config: RunConfig, tokenizer: Tokenizer, row_indices: Sequence[int]
) -> Iterator[ShownRow]:
    """Rows of a run's first phase with all their samples, substitutes and augmentation included.

    Raises ConfigError and DataError as the run would.
    """
    data = config.data
    require(bool(data.sources), "data.sources is empty; name data sets, or give --data")
    require(
        data.phase == 1,
        f"data.phase is {data.phase}, whose rows depend on where the run was; only those of phase "
        "1 can be shown, with its sources and data.phase=1",
    )
    check_groups(config)
    datasets = open_sources(data)
    packing = load_packing(config, datasets, tokenizer)
    phase = phases.first_phase(data, datasets, packing)
    order = TrainingOrder(data, datasets, phase, packing, config.train.epochs or None)
    builder = SampleBuilder.of(config, tokenizer)
    rows = TrainingDataset(data, datasets, order, builder, row_alignment(config))
    try:
        for index in row_indices:
            if index < 0:
                raise DataError(f"row {index}: rows count from 0")
            samples, bad = rows.row(index)
            shown = [_shown(s, config, tokenizer, data.sources[s.source].path) for s in samples]
            filled = sum(sample.length for sample in samples)
            title = f"row {index}: {filled} of {data.sequence_length} positions"
            yield ShownRow(title if samples else f"row {index}: empty", shown, bad)
    finally:
        rows.close()


def _shown(sample: Sample, config: RunConfig, tokenizer: Tokenizer, source: str) -> ShownSample:
    each = config.model.tokens_per_image
    spans = spans_of(sample.tokens, sample.labels, sample.modality, each, tokenizer)
    return ShownSample(sample, spans, source)


def _checked(dataset: ShardedDataset, index: int) -> int:
    """A place of the data set, counted from its start."""
    if not -len(dataset) <= index < len(dataset):
        raise DataError(f"{dataset.location} has {len(dataset)} samples, there is no {index}")
    return index % len(dataset)


def _indices_of(dataset: ShardedDataset, keys: Sequence[str]) -> list[int]:
    """The first place of each key."""
    found: dict[str, int] = {}
    unreadable = 0
    for index in range(len(dataset) if keys else 0):
        try:
            found.setdefault(dataset[index].key, index)
        except BadSampleError:
            unreadable += 1
        if found.keys() >= set(keys):
            break
    if lost := [key for key in keys if key not in found]:
        raise DataError(
            f"{dataset.location} has no sample with the key {lost[0]!r}; {unreadable} of its "
            f"{len(dataset)} samples cannot be read"
        )
    return [found[key] for key in keys]
