"""Raw inputs of the released model (ids with -200 for an image) to the inputs of Owl2.

The released code expands the placeholders inside the forward pass; here it is done before.
"""

from dataclasses import dataclass

import torch

from megatron_owl2.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID


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
    multiple_of: int = 1,
) -> Expanded:
    """Replace each -200 in input_ids [b, s] by the visual tokens of its image(s).

    Images are consumed strictly in order, row after row; a row without placeholder consumes one
    (official behaviour: a text-only sample brings a dummy image). `labels` [b, s] are unshifted;
    `images_per_placeholder` lists, in order of consumption, how many images each placeholder (or
    text-only row) takes, one by default. Rows are right padded with token 0 to the longest one,
    rounded up to `multiple_of`. Raises ValueError for a mask that is not right padding and for a
    list of the wrong length.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = mask.bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any() or not mask[:, 0].all():
        raise ValueError("attention_mask must be right padding: ones, then zeros, in every row")
    placeholders = (input_ids == IMAGE_TOKEN_ID).sum(1)
    takers = int(placeholders.clamp(min=1).sum())
    counts = [1] * takers if images_per_placeholder is None else list(images_per_placeholder)
    if len(counts) != takers:
        raise ValueError(f"{takers} placeholders and text-only rows, but {len(counts)} counts")
    counts = iter(counts)
    rows, owners, idle, image = [], [], [], 0
    for ids, keep, targets in zip(
        input_ids.tolist(),
        mask.tolist(),
        [None] * len(input_ids) if labels is None else labels.tolist(),
        strict=True,
    ):
        row = []  # (token, label, modality, valid)
        if IMAGE_TOKEN_ID not in ids:
            count = next(counts)
            idle.extend(range(image, image + count))
            image += count
        for t, token in enumerate(ids):
            if token == IMAGE_TOKEN_ID:
                count = next(counts)
                owners.extend(range(image, image + count))
                image += count
                row += [(0, IGNORE_INDEX, 1, True)] * (count * tokens_per_image)
            else:
                row.append((token, IGNORE_INDEX if targets is None else targets[t], 0, keep[t]))
        rows.append(row)
    lengths = torch.tensor([len(row) for row in rows])
    length = -(-int(lengths.max()) // multiple_of) * multiple_of
    padding = (0, IGNORE_INDEX, 0, False)
    table = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    tokens, unshifted, modality, valid = table.unbind(-1)
    shifted = torch.full_like(unshifted, IGNORE_INDEX)
    shifted[:, :-1] = unshifted[:, 1:]
    batch, position = modality.nonzero(as_tuple=True)  # row after row, image after image
    return Expanded(
        tokens=tokens.contiguous(),
        labels=shifted,
        modality=modality.contiguous(),
        position_ids=torch.arange(length).expand(len(rows), -1).contiguous(),
        valid=valid.bool(),
        lengths=lengths,
        vision_token_index=position * len(rows) + batch,
        image_order=torch.tensor(owners + idle),
    )
