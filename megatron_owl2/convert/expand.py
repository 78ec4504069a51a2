"""Conversion of the released model's raw inputs (ids with -200 for an image) to those of Owl2.

The released code expands the placeholders inside the forward pass; here it is done before.
"""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_owl2.data.image_tokens import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    TEXT,
    VISION,
    expand_placeholders,
    vision_token_index,
)


@dataclass(frozen=True)
class Expanded:
    """A micro-batch with every placeholder replaced by visual tokens.

    tokens, modality, position_ids, labels int64 [b, s]; labels are shifted, -100 is ignored;
    valid bool [b, s], False on padding; lengths int64 [b] count what an expanded row has, its own
    padding included. vision_token_index int64 [n] as `data.batch.Batch` has it.
    image_order int64 [images]: the images that own rows first, then those of rows without text
    placeholder, which own none.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    modality: torch.Tensor
    position_ids: torch.Tensor
    valid: torch.Tensor
    lengths: torch.Tensor
    vision_token_index: torch.Tensor
    image_order: torch.Tensor


def expand(
    input_ids: torch.Tensor,
    tokens_per_image: int,
    *,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    images_per_placeholder: list[int] | None = None,
    text_takes_an_image: bool = True,
    multiple_of: int = 1,
) -> Expanded:
    """Rows in which each -200 of input_ids [b, s] has become the visual tokens of its image(s).

    Images are consumed strictly in order, row after row; a row without placeholder consumes one if
    `text_takes_an_image` (layouts.py: a text-only sample of mPLUG-Owl2 brings a dummy image).
    `labels` [b, s] are unshifted; `images_per_placeholder` lists, in order of consumption, how many
    images each placeholder (or text-only row) takes, one by default. Rows are right padded with
    token 0 to the longest one, rounded up to `multiple_of`. Raises ValueError for a mask that is
    not right padding and for a list of the wrong length.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = mask.bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any() or not mask[:, 0].all():
        raise ValueError("attention_mask must be right padding: ones, then zeros, in every row")
    placeholders = (input_ids == IMAGE_TOKEN_ID).sum(1)
    fewest = int(text_takes_an_image)
    takers = int(placeholders.clamp(min=fewest).sum())
    counts = [1] * takers if images_per_placeholder is None else list(images_per_placeholder)
    if len(counts) != takers:
        rows_too = " and text-only rows" if text_takes_an_image else ""
        raise ValueError(f"{takers} placeholders{rows_too}, but {len(counts)} counts")
    remaining = iter(counts)
    rows, valid, owners, idle, image = [], [], [], [], 0
    for number, (ids, keep) in enumerate(zip(input_ids.numpy(), mask.numpy(), strict=True)):
        own = int(placeholders[number])
        taken = [next(remaining) for _ in range(max(own, fewest))]
        (owners if own else idle).extend(range(image, image + sum(taken)))
        image += sum(taken)
        targets = None if labels is None else labels[number].numpy()
        row = expand_placeholders(ids, tokens_per_image, targets, taken if own else None)
        rows.append(row)
        valid.append((row.modality == VISION) | keep[row.origin])
    lengths = torch.tensor([len(row.tokens) for row in rows])
    length = -(-int(lengths.max()) // multiple_of) * multiple_of
    unshifted = _right_padded([row.labels for row in rows], length, IGNORE_INDEX)
    shifted = torch.full_like(unshifted, IGNORE_INDEX)
    shifted[:, :-1] = unshifted[:, 1:]
    modality = _right_padded([row.modality for row in rows], length, TEXT)
    return Expanded(
        tokens=_right_padded([row.tokens for row in rows], length, 0),
        labels=shifted,
        modality=modality,
        position_ids=torch.arange(length).expand(len(rows), -1).contiguous(),
        valid=_right_padded(valid, length, False),
        lengths=lengths,
        vision_token_index=vision_token_index(modality),
        image_order=torch.tensor(owners + idle),
    )


def _right_padded(rows: list[np.ndarray], length: int, value: int | bool) -> torch.Tensor:
    """Rows of one dtype as a table [b, length]."""
    table = np.full((len(rows), length), value, dtype=rows[0].dtype)
    for target, row in zip(table, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(table)
