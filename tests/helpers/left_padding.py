"""Left-padded inputs of prompts, as transformers' generate takes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_owl2.data.image_tokens import TEXT, expand_placeholders, vision_token_index


@dataclass(frozen=True)
class LeftPadded:
    """tokens, modality, position_ids int64 [b, s]; vision_token_index int64 [n]; valid bool [b, s],
    False on padding; attention_mask bool [b, 1, s, s]."""

    tokens: torch.Tensor
    modality: torch.Tensor
    position_ids: torch.Tensor
    vision_token_index: torch.Tensor
    valid: torch.Tensor
    attention_mask: torch.Tensor


def left_padded(prompts: Sequence[Sequence[int]], tokens_per_image: int) -> LeftPadded:
    """Ids with placeholders -200, all rows ending at the last position."""
    rows = [expand_placeholders(prompt, tokens_per_image) for prompt in prompts]
    b, s = len(rows), max(len(row.tokens) for row in rows)
    tokens, modality = torch.zeros(b, s, dtype=torch.int64), torch.full((b, s), TEXT)
    first = torch.tensor([s - len(row.tokens) for row in rows]).unsqueeze(1)
    for i, row in enumerate(rows):
        tokens[i, first[i] :] = torch.from_numpy(row.tokens)
        modality[i, first[i] :] = torch.from_numpy(row.modality)
    valid = torch.arange(s) >= first
    # A padding position sees itself, since a softmax over nothing is NaN in some attention kernels.
    causal = torch.ones(s, s, dtype=torch.bool).tril()
    allowed = (causal & valid.unsqueeze(1)) | torch.eye(s, dtype=torch.bool)
    return LeftPadded(
        tokens,
        modality,
        (torch.arange(s) - first).clamp(min=0),
        vision_token_index(modality),
        valid,
        allowed.unsqueeze(1),
    )
