"""Inputs of the decoder for whole prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_owl2.data.image_tokens import ExpandedRow, vision_token_index
from megatron_owl2.mcore.packed_sequences import PackedSequences


@dataclass(frozen=True)
class DecoderInputs:
    """Inputs of one pass of the decoder: tokens, modality, position_ids int64 [1, s] and
    vision_token_index int64 [n] of the prompts in `sequences`, each from position 0 on."""

    tokens: torch.Tensor
    modality: torch.Tensor
    position_ids: torch.Tensor
    vision_token_index: torch.Tensor
    sequences: PackedSequences


def packed(prompts: Sequence[ExpandedRow], device: torch.device | None) -> DecoderInputs:
    """Prompts one after the other in one row, so that nothing is computed for padding."""
    lengths = [len(prompt.tokens) for prompt in prompts]
    tokens = np.concatenate([prompt.tokens for prompt in prompts])
    modality = np.concatenate([prompt.modality for prompt in prompts])
    modality = torch.from_numpy(modality.astype(np.int64))[None]
    sequences = PackedSequences.of([lengths], len(tokens))
    return DecoderInputs(
        tokens=torch.from_numpy(tokens.astype(np.int64))[None].to(device),
        modality=modality.to(device),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        vision_token_index=vision_token_index(modality).to(device),
        sequences=sequences.with_offsets(sequences.cu_seqlens.to(device)),
    )
