"""Training data as a map-style dataset: records read, decoded, tokenised, bad ones substituted.

What a row holds is a pure function of the data, the seed and its index. So any worker may build any
micro-batch, ranks with the same data-parallel rank build equal ones, and resuming is a seek.
"""

import time
from collections import defaultdict
from collections.abc import Sequence

from torch.utils.data import Dataset

from megatron_owl2.config.schema import DataConfig
from megatron_owl2.data.batch import BadSample, Batch, collate
from megatron_owl2.data.conversation import Sample
from megatron_owl2.data.sample_builder import Augmentation, SampleBuilder
from megatron_owl2.data.sampling.prefetch import Prefetcher
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.training_order import TrainingOrder
from megatron_owl2.errors import BadSampleError, DataError

SUBSTITUTES = 8  # how many other samples are tried in place of one


class TrainingDataset(Dataset):
    """Map-style dataset from lists of row indices to batches; holds no position.

    Batches are as long as their longest row and `row_alignment` ask (row_length.py). A sample that
    cannot be used is replaced by another one; in a packed row, planned for the lengths of its own,
    it is left out.
    """

    def __init__(
        self,
        config: DataConfig,
        datasets: Sequence[ShardedDataset],
        order: TrainingOrder,
        builder: SampleBuilder,
        row_alignment: int,
    ):
        self.datasets, self.order = datasets, order
        self._config = config
        self._builder, self._row_alignment = builder, row_alignment
        self._prefetcher = Prefetcher(self.datasets, order.samples)

    def __getitem__(self, row_indices: list[int]) -> Batch:
        """The batch of these rows. Raises DataError if a sample and all its substitutes are bad,
        ShardError if a shard is not what its manifest says, StorageError if it cannot be read."""
        bad: list[BadSample] = []
        measured = defaultdict(float, read_retries=-self._retries())
        packed = self.order.packed is not None
        batch = collate(
            [self._row(row_index, bad, measured) for row_index in row_indices],
            row_indices=row_indices,
            image_size=self._builder.blank_size,
            row_alignment=self._row_alignment,
            sequence_length=self._builder.sequence_length,
            packed=packed,
        )
        measured["read_retries"] += self._retries()
        batch.bad_samples, batch.measurements = bad, measured
        return batch

    def row(self, row_index: int) -> tuple[list[Sample], list[BadSample]]:
        """The samples of a row and those that cannot be used; raises what reading a batch does."""
        bad: list[BadSample] = []
        return self._row(row_index, bad, defaultdict(float)), bad

    def _row(
        self, row_index: int, bad: list[BadSample], measured: dict[str, float]
    ) -> list[Sample]:
        """The samples of a row; unusable ones are added to `bad`, bytes and seconds to
        `measured`."""
        places = self.order.row(row_index)
        attempts = 1 if self.order.packed is not None else 1 + SUBSTITUTES
        samples: list[Sample] = []
        for place in places:
            tried: list[BadSample] = []
            sample = self._sample(row_index, place, attempts, tried, measured, samples)
            bad += tried
            if sample is not None:
                samples.append(sample)
            elif attempts > 1:
                raise DataError(
                    f"sample {row_index} and {SUBSTITUTES} substitutes for it are all unusable:\n  "
                    + "\n  ".join(entry.reason for entry in tried)
                )
        return samples

    def _sample(
        self,
        row_index: int,
        place: int,
        attempts: int,
        bad: list[BadSample],
        measured: dict[str, float],
        beside: list[Sample],
    ) -> Sample | None:
        """The sample at a place of the order, or its first usable substitute, or None; `beside` are
        those that the row has already."""
        self._prefetcher.advance_to(place)
        for attempt in range(attempts):
            source, shard, index = self.order.samples.sample_at(place, attempt)
            dataset = self.datasets[source]
            key = None
            try:
                started = time.perf_counter()
                record = dataset.read(shard, index)
                measured["read_seconds"] += time.perf_counter() - started
                measured["bytes"] += sum(map(len, record.images))
                key = record.key
                augmentation = self._augmentation(place)
                sample = self._builder.build(record, measured, augmentation, beside)
            except BadSampleError as error:
                name, (offset, _) = dataset.shards[shard]["name"], dataset.range_of(shard, index)
                where = dataset.location, name, offset
                bad.append(BadSample(row_index, key, source, *where, str(error)))
            except Exception as error:
                name = dataset.shards[shard]["name"]
                error.add_note(f"row {row_index}: sample {index} of {name}")
                raise
            else:
                sample.source = source
                return sample
        return None

    def close(self) -> None:
        """End the prefetching; the dataset can be used again."""
        self._prefetcher.close()

    def _augmentation(self, place: int) -> Augmentation:
        config = self._config
        index = self.order.first + place
        return Augmentation(config.seed, index, config.augment, config.scaled_decoding)

    def _retries(self) -> int:
        own = sum(dataset.storage.counters["retries"] for dataset in self.datasets)
        return int(own) + self._prefetcher.retries
