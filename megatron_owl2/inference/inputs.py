"""Inputs of the decoder for whole prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_owl2.data.image_tokens import TEXT, ExpandedRow, vision_token_index


@dataclass(frozen=True)
class DecoderInputs:
    """Inputs of one pass of the decoder: tokens, modality, position_ids int64 [b, s] and
    vision_token_index int64 [n]."""

    tokens: torch.Tensor
    modality: torch.Tensor
    position_ids: torch.Tensor
    vision_token_index: torch.Tensor


def right_padded(rows: Sequence[ExpandedRow], device: torch.device | None) -> DecoderInputs:
    """Prompts from position 0 on. Padding follows them, so that no token sees it."""
    b, s = len(rows), max(len(row.tokens) for row in rows)
    tokens, modality = torch.zeros(b, s, dtype=torch.int64), torch.full((b, s), TEXT)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.from_numpy(row.tokens)
        modality[i, : len(row.tokens)] = torch.from_numpy(row.modality)
    return DecoderInputs(
        tokens=tokens.to(device),
        modality=modality.to(device),
        position_ids=torch.arange(s, device=device).expand(b, -1),
        vision_token_index=vision_token_index(modality).to(device),
    )
