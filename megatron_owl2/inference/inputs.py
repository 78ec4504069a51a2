"""Inputs of the decoder during generation: left-padded prompts, then one token per row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_owl2.data.image_tokens import TEXT, expand_placeholders, vision_token_index


@dataclass(frozen=True)
class DecoderInputs:
    """Inputs of one call of the decoder.

    tokens, modality, position_ids int64 [b, s]; vision_token_index int64 [n]; valid bool [b, all
    positions so far], False on padding; attention_mask bool [b, 1, s, all positions so far].
    """

    tokens: torch.Tensor
    modality: torch.Tensor
    position_ids: torch.Tensor
    vision_token_index: torch.Tensor
    valid: torch.Tensor
    attention_mask: torch.Tensor

    def followed_by(self, token: torch.Tensor) -> "DecoderInputs":
        """The inputs of the next call, which reads the new text `token` [b]."""
        token = token.unsqueeze(1)
        valid = torch.cat([self.valid, torch.ones_like(token, dtype=torch.bool)], dim=1)
        return DecoderInputs(
            tokens=token,
            modality=torch.full_like(token, TEXT),
            position_ids=self.position_ids[:, -1:] + 1,
            vision_token_index=self.vision_token_index[:0],
            valid=valid,
            attention_mask=valid[:, None, None],
        )


def left_padded(
    prompts: Sequence[Sequence[int]], tokens_per_image: int, device: torch.device
) -> DecoderInputs:
    """Inputs of the first call: ids with placeholders, all rows ending at the last position."""
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
    return DecoderInputs(
        tokens=tokens.to(device),
        modality=modality.to(device),
        position_ids=(torch.arange(s) - first).clamp(min=0).to(device),
        vision_token_index=vision_token_index(modality).to(device),
        valid=valid.to(device),
        attention_mask=allowed.unsqueeze(1).to(device),
    )
