"""Micro-batch as a data worker makes it: as long as its longest row, nothing is inserted later."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain

import numpy as np
import torch
from torch.nn.functional import pad

from megatron_owl2.data.conversation import Sample
from megatron_owl2.data.image_tokens import (
    IGNORE_INDEX,
    TEXT,
    target_index,
    vision_token_index,
)
from megatron_owl2.data.row_length import padded_length
from megatron_owl2.mcore import context_parallel
from megatron_owl2.mcore.packed_sequences import PackedSequences


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and why; one line of a BadSampleLog."""

    sample_index: int
    key: str | None  # None if the sample could not even be read
    source: int  # number of the data set
    dataset: str
    shard: str
    offset: int
    reason: str


@dataclass
class Batch:
    """A micro-batch of b rows of s positions with n >= 1 images.

    A row is one sample, or several that are `packed`, or none and padding alone.
    tokens, labels (shifted: labels[:, t] is the target of position t; -100 ignored), modality (0
    text and padding, 1 vision) and position_ids (from 0 in every sample) are int64 [b, s],
    loss_mask is float32 [b, s], has_image bool [b, s]: whether a position's sample has an image.
    image is uint8 [n, 3, H, W], channels last in memory; without any image one black image that
    owns no rows keeps every parameter in the graph. Where images are not wanted H and W are 0.
    vision_token_index, int64 [images * tokens_per_image], are the rows of the images in the
    flattened sequence-first [s * b] hidden states: position * b + row, image after image.
    target_index, int64 [n >= 1], are those of the targets in the same way
    (`image_tokens.target_index`). lengths, int64 [b], are the positions that are not padding, and
    sample_indices, int64 [b], those of the rows in the training order. keys, sources (which
    of the data sets, int64) and sample_lengths (positions) are of the samples, row after row, of
    which each has `samples_per_row`; `shortened` are the sources of those that lost turns or the
    end of an answer."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    modality: torch.Tensor
    position_ids: torch.Tensor
    image: torch.Tensor
    vision_token_index: torch.Tensor
    target_index: torch.Tensor
    has_image: torch.Tensor
    lengths: torch.Tensor
    sample_indices: torch.Tensor
    sources: torch.Tensor
    keys: list[str]
    sample_lengths: list[int]
    samples_per_row: list[int]
    packed: PackedSequences | None = None
    shortened: list[int] = field(default_factory=list)
    bad_samples: list[BadSample] = field(default_factory=list)
    measurements: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    local_vision_token_index: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.tokens.shape[1]

    @property
    def bad(self) -> int:
        """Number of samples that were replaced, or, in packed rows, left out."""
        return sum(map(self.bad_in_row, {sample.sample_index for sample in self.bad_samples}))

    @property
    def asked(self) -> int:
        """Number of samples that the rows are made of, bad ones included."""
        return len(self.keys) + (self.bad if self.packed else 0)

    def bad_in_row(self, sample_index: int) -> int:
        """Number of samples of a row that were replaced or left out; of several substitutes for
        one, those that were bad too do not count."""
        tried = sum(sample.sample_index == sample_index for sample in self.bad_samples)
        return tried if self.packed else min(tried, 1)

    def local_to(self, rank: int, size: int) -> "Batch":
        """The share of context-parallel rank `rank` of `size` (mcore/context_parallel.py).

        labels, loss_mask, has_image, modality and position_ids become [b, s / size], target_index
        that of these labels. tokens, image, packed and vision_token_index stay whole, because the
        model splits only after it has put the images in.
        """
        if size == 1:
            return self
        places = context_parallel.positions(self.length, rank, size)
        modality, labels = self.modality[:, places], self.labels[:, places]
        return replace(
            self,
            labels=labels,
            target_index=target_index(labels),
            loss_mask=self.loss_mask[:, places],
            has_image=self.has_image[:, places],
            modality=modality,
            position_ids=self.position_ids[:, places],
            local_vision_token_index=vision_token_index(modality),
        )

    def padded_to(self, length: int) -> "Batch":
        """The same rows with padding up to `length` positions."""
        missing = length - self.length
        if not missing:
            return self
        return replace(
            self,
            tokens=pad(self.tokens, (0, missing)),
            labels=pad(self.labels, (0, missing), value=IGNORE_INDEX),
            loss_mask=pad(self.loss_mask, (0, missing)),
            has_image=pad(self.has_image, (0, missing)),
            modality=pad(self.modality, (0, missing), value=TEXT),
            position_ids=pad(self.position_ids, (0, missing)),
            packed=self.packed and self.packed.padded(missing),
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, which the DataLoader asks for."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function) -> "Batch":
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        tensors = {name: v for name, v in values.items() if isinstance(v, torch.Tensor)}
        packed = self.packed and self.packed.with_offsets(function(self.packed.cu_seqlens))
        moved = {name: function(tensor) for name, tensor in tensors.items()}
        return replace(self, packed=packed, **moved)


def collate(
    rows: Sequence[Sequence[Sample]],
    *,
    row_indices: Sequence[int],
    image_size: int,
    row_alignment: int,
    sequence_length: int,
    packed: bool,
) -> Batch:
    """Stack rows of samples, cut to the longest of them as `row_alignment` allows (row_length.py).

    Without `packed` a row has one sample at most. `row_indices` are those of the training order;
    `image_size` is H = W of the black image of a batch without any (0: none).
    """
    lengths = [[sample.length for sample in row] for row in rows]
    longest = max(1, *map(sum, lengths))
    length = padded_length(longest, row_alignment, sequence_length)

    def stack(parts: Callable[[Sample], np.ndarray], fill: int) -> torch.Tensor:
        table = np.full((len(rows), length), fill, dtype=np.int64)
        for line, row in zip(table, rows, strict=True):
            joined = np.concatenate([*map(parts, row), line[:0]])
            line[: len(joined)] = joined
        return torch.from_numpy(table)

    labels = stack(lambda sample: sample.labels, IGNORE_INDEX)
    modality = stack(lambda sample: sample.modality, TEXT)
    samples = list(chain.from_iterable(rows))
    images = list(chain.from_iterable(sample.images for sample in samples))
    if not images:
        images = [torch.zeros(3, image_size, image_size, dtype=torch.uint8)]
    return Batch(
        tokens=stack(lambda sample: sample.tokens, 0),
        labels=labels,
        loss_mask=(labels != IGNORE_INDEX).float(),
        has_image=stack(lambda s: np.full(s.length, s.image_count > 0), 0).bool(),
        modality=modality,
        position_ids=stack(lambda sample: np.arange(sample.length), 0),
        image=torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2),
        vision_token_index=vision_token_index(modality),
        target_index=target_index(labels),
        lengths=torch.tensor([*map(sum, lengths)]),
        sample_indices=torch.tensor(row_indices),
        sources=torch.tensor([sample.source for sample in samples], dtype=torch.int64),
        keys=[sample.key for sample in samples],
        sample_lengths=[sample.length for sample in samples],
        samples_per_row=[*map(len, rows)],
        packed=PackedSequences.of(lengths, length) if packed else None,
        shortened=[sample.source for sample in samples if sample.shortened],
    )


def equally_long(batches: Sequence[Batch]) -> list[Batch]:
    """The batches, padded to the longest of them."""
    length = max(batch.length for batch in batches)
    return [batch.padded_to(length) for batch in batches]
