"""Visual tokens among the text: the placeholder of an image in ids, and the rows it becomes.

In ids an image is one placeholder; in the decoder it is as many rows as the abstractor has tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the help of owl2 evaluate comes without it
    import torch

IMAGE_TOKEN_ID = -200  # the placeholder among ids, before the image's rows take its place
IGNORE_INDEX = -100  # a label that the loss skips
TEXT, VISION = 0, 1  # modality indicators; padding counts as text


@dataclass(frozen=True)
class ExpandedRow:
    """Ids whose placeholders have become the rows of their images, each int64 [s expanded].

    Vision rows have token 0, which `Owl2.merge` replaces, and the label IGNORE_INDEX; labels are
    not shifted. `origin` is the index among the ids that each row comes from.
    """

    tokens: np.ndarray
    labels: np.ndarray
    modality: np.ndarray
    origin: np.ndarray


def expand_placeholders(
    ids: Sequence[int] | np.ndarray,
    tokens_per_image: int,
    labels: Sequence[int] | np.ndarray | None = None,
    images_per_placeholder: Sequence[int] | None = None,
) -> ExpandedRow:
    """A row in which each placeholder has become `tokens_per_image` rows for each of its images.

    `labels` has one label per id, by default all are ignored; `images_per_placeholder` has one
    number per placeholder, by default 1.
    """
    array = np.asarray(ids, dtype=np.int64)
    vision = array == IMAGE_TOKEN_ID
    rows = np.ones(len(array), dtype=np.int64)
    rows[vision] = tokens_per_image
    if images_per_placeholder is not None:
        rows[vision] *= np.asarray(images_per_placeholder, dtype=np.int64)
    origin = np.repeat(np.arange(len(array)), rows)
    targets = np.full_like(array, IGNORE_INDEX) if labels is None else np.asarray(labels, np.int64)
    return ExpandedRow(
        tokens=np.where(vision, 0, array)[origin],
        labels=np.where(vision, IGNORE_INDEX, targets)[origin],
        modality=np.where(vision, VISION, TEXT)[origin],
        origin=origin,
    )


def vision_token_index(modality: "torch.Tensor") -> "torch.Tensor":
    """Rows of the visual tokens in sequence-first hidden states flattened to [s * b, h].

    From a modality table [b, s] to int64 [n]: position * b + row, image after image as the images
    of a batch are ordered, row after row.
    """
    row, position = (modality == VISION).nonzero(as_tuple=True)
    return position * len(modality) + row


def target_index(labels: "torch.Tensor") -> "torch.Tensor":
    """Rows that have a target in sequence-first hidden states flattened to [s * b, h].

    From labels [b, s] to int64 [n]: position * b + row, in increasing order. Without any target it
    is row 0, whose label the loss skips: the output layer takes part in every backward pass.
    """
    flat = labels.t().flatten()
    rows = (flat != IGNORE_INDEX).nonzero().squeeze(1)
    return rows if len(rows) else rows.new_zeros(1)
