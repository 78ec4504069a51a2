"""Validation data as a map-style dataset: a fixed choice of samples, never augmented."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_owl2.data import images
from megatron_owl2.data.batch import BadSample, Batch, collate
from megatron_owl2.data.conversation import Sample, build_sample
from megatron_owl2.data.image_tokens import IGNORE_INDEX, TEXT
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import BadSampleError


class ValidationDataset(Dataset):
    """Map-style dataset from lists of numbers below `len(self)` to batches.

    It holds `samples` samples spread evenly over a data set, or all of it for 0. A number from
    `len(self)` on is an empty row without targets, which fills a batch up. A sample that cannot be
    used is an empty row too, listed among the batch's `bad_samples`. Batches are as long as their
    longest row and `row_alignment` ask. With `decode_images=False` images are only checked, so that
    all ranks of a model find the same samples bad.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        samples: int,
        *,
        tokenizer: Tokenizer,
        tokens_per_image: int,
        sequence_length: int,
        image_size: int,
        row_alignment: int,
        decode_images: bool = True,
        to_square: images.SquareResize = images.STRETCH,
    ):
        self.dataset = dataset
        self._count = min(samples, len(dataset)) if samples else len(dataset)
        self._tokenizer, self._tokens_per_image = tokenizer, tokens_per_image
        self._sequence_length, self._image_size = sequence_length, image_size
        self._row_alignment, self._decode_images = row_alignment, decode_images
        self._to_square = to_square

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, numbers: Sequence[int]) -> Batch:
        """The batch of these samples; raises ShardError and StorageError as reading does."""
        bad: list[BadSample] = []
        samples = [self._sample(number, bad) for number in numbers]
        image_size = self._image_size if self._decode_images else 0
        batch = collate(samples, image_size, self._row_alignment)
        batch.bad_samples = bad
        return batch

    def _sample(self, number: int, bad: list[BadSample]) -> Sample:
        if number >= len(self):
            return self._empty()
        index = number * len(self.dataset) // len(self)
        shard, place = self.dataset.find(index)
        try:
            record = self.dataset.read(shard, place)
            sample = build_sample(
                record, self._tokenizer, self._tokens_per_image, self._sequence_length
            )
            if record.image is not None:
                sample.image = self._image(record.image)
        except BadSampleError as error:
            name, (offset, _) = (
                self.dataset.shards[shard]["name"],
                self.dataset.range_of(shard, place),
            )
            where = self.dataset.location, name, offset
            bad.append(BadSample(number, None, 0, *where, str(error)))
            return self._empty()
        sample.sample_index, sample.key = number, record.key
        return sample

    def _image(self, data: bytes) -> torch.Tensor:
        if not self._decode_images:
            images.check(data)
            return torch.empty(3, 0, 0, dtype=torch.uint8)
        return images.load_square(data, self._image_size, to_square=self._to_square)

    def _empty(self) -> Sample:
        length = self._sequence_length
        return Sample(
            tokens=np.zeros(length, dtype=np.int64),
            labels=np.full(length, IGNORE_INDEX, dtype=np.int64),
            modality=np.full(length, TEXT, dtype=np.int64),
            length=1,
            shortened=False,
        )
