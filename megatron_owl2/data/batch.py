"""Micro-batch as a data worker makes it: as long as its longest row, nothing is inserted later."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

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

    tokens, labels (shifted: labels[:, t] is the target of position t; -100 ignored), modality (0
    text and padding, 1 vision) and position_ids are int64 [b, s], loss_mask is float32 [b, s].
    image is uint8 [n, 3, H, W], channels last in memory; without any image one black image that
    owns no rows keeps every parameter in the graph. Where images are not wanted H and W are 0.
    vision_token_index, int64 [images * tokens_per_image], are the rows of the images in the
    flattened sequence-first [s * b] hidden states: position * b + row, image after image.
    target_index, int64 [n >= 1], are those of the targets in the same way
    (`image_tokens.target_index`). lengths, int64 [b], are the positions that are not padding;
    sample_indices (in the training order) and sources (which of the data sets each row is from)
    are int64 [b]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    modality: torch.Tensor
    position_ids: torch.Tensor
    image: torch.Tensor
    vision_token_index: torch.Tensor
    target_index: torch.Tensor
    lengths: torch.Tensor
    sample_indices: torch.Tensor
    sources: torch.Tensor
    keys: list[str]
    shortened: int = 0  # samples that lost turns or the end of an answer
    bad_samples: list[BadSample] = field(default_factory=list)
    measurements: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    local_vision_token_index: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.tokens.shape[1]

    @property
    def bad(self) -> int:
        """Number of samples that are substitutes."""
        return len({sample.sample_index for sample in self.bad_samples})

    def local_to(self, rank: int, size: int) -> "Batch":
        """The share of context-parallel rank `rank` of `size` (mcore/context_parallel.py).

        labels, loss_mask, modality and position_ids become [b, s / size], target_index that of
        these labels. tokens, image and vision_token_index stay whole, because the model splits only
        after it has put the images in.
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
            modality=pad(self.modality, (0, missing), value=TEXT),
            position_ids=torch.arange(length).repeat(len(self.tokens), 1),
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
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def collate(samples: Sequence[Sample], image_size: int, row_alignment: int) -> Batch:
    """Stack samples, cut to the longest of them as `row_alignment` allows (row_length.py).

    `image_size` is H = W of the black image of a text-only batch (0: none).
    """
    longest = max(sample.length for sample in samples)
    length = padded_length(longest, row_alignment, len(samples[0].tokens))

    def stack(name: str) -> torch.Tensor:
        rows = [getattr(sample, name)[:length] for sample in samples]
        return torch.from_numpy(np.stack(rows))

    labels, modality = stack("labels"), stack("modality")
    images = [sample.image for sample in samples if sample.image is not None]
    if not images:
        images = [torch.zeros(3, image_size, image_size, dtype=torch.uint8)]
    return Batch(
        tokens=stack("tokens"),
        labels=labels,
        loss_mask=(labels != IGNORE_INDEX).float(),
        modality=modality,
        position_ids=torch.arange(length).repeat(len(samples), 1),
        image=torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2),
        vision_token_index=vision_token_index(modality),
        target_index=target_index(labels),
        lengths=torch.tensor([sample.length for sample in samples]),
        sample_indices=torch.tensor([sample.sample_index for sample in samples]),
        sources=torch.tensor([sample.source for sample in samples]),
        keys=[sample.key for sample in samples],
        shortened=sum(sample.shortened for sample in samples),
    )


def equally_long(batches: Sequence[Batch]) -> list[Batch]:
    """The batches, padded to the longest of them."""
    length = max(batch.length for batch in batches)
    return [batch.padded_to(length) for batch in batches]
