"""Validation data as a map-style dataset: a fixed choice of samples, never augmented."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from megatron_owl2.data.batch import BadSample, Batch, collate
from megatron_owl2.data.conversation import Sample
from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.data.sampling.packed_order import Packing
from megatron_owl2.data.sampling.packing import pack
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.errors import BadSampleError


class ValidationDataset(Dataset):
    """Map-style dataset from lists of row numbers below `len(self)` to batches.

    It holds `samples` samples spread evenly over a data set, or all of it for 0; a row is one of
    them, or as many as `packing` puts there. A number from `len(self)` on is an empty row, which
    fills a batch up. A sample that cannot be used is left out and listed among the batch's
    `bad_samples`. Batches are as long as their longest row and `row_alignment` ask.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        samples: int,
        builder: SampleBuilder,
        row_alignment: int,
        packing: Packing | None = None,
    ):
        self.dataset = dataset
        self.samples = min(samples, len(dataset)) if samples else len(dataset)
        self._builder, self._row_alignment = builder, row_alignment
        self._packed = packing is not None
        chosen = np.arange(self.samples) * len(dataset) // self.samples
        if packing is None:
            self._rows = [[index] for index in chosen.tolist()]
        else:
            rows = pack(*packing.demand(0, chosen), packing.row_length, packing.images_per_row)
            self._rows = [chosen[row].tolist() for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, numbers: Sequence[int]) -> Batch:
        """The batch of these rows; raises ShardError and StorageError as reading does."""
        bad: list[BadSample] = []
        batch = collate(
            [self._row(number, bad) for number in numbers],
            row_indices=numbers,
            image_size=self._builder.blank_size,
            row_alignment=self._row_alignment,
            sequence_length=self._builder.sequence_length,
            packed=self._packed,
        )
        batch.bad_samples = bad
        return batch

    def _row(self, number: int, bad: list[BadSample]) -> list[Sample]:
        if number >= len(self):
            return []
        samples: list[Sample] = []
        for index in self._rows[number]:
            shard, place = self.dataset.find(index)
            try:
                record = self.dataset.read(shard, place)
                sample = self._builder.build(record, defaultdict(float), beside=samples)
            except BadSampleError as error:
                offset, _ = self.dataset.range_of(shard, place)
                where = self.dataset.location, self.dataset.shards[shard]["name"], offset
                bad.append(BadSample(number, None, 0, *where, str(error)))
            else:
                samples.append(sample)
        return samples
