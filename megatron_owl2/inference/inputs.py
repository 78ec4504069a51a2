"""What the decoder reads while it answers: prompts padded on the left, then one token per row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_owl2.data.conversation import IMAGE_TOKEN_ID


@dataclass(frozen=True)
class DecoderInputs:
    """What one call of the decoder reads: tokens, modality, position_ids int64 [b, s],
    vision_token_index int64 [n], valid bool [b, all positions so far], attention_mask bool [b, 1,
    s, so far]."""

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
            modality=torch.zeros_like(token),
            position_ids=self.position_ids[:, -1:] + 1,
            vision_token_index=self.vision_token_index[:0],
            valid=valid,
            attention_mask=valid[:, None, None],
        )


def left_padded(
    prompts: Sequence[Sequence[int]], tokens_per_image: int, device: torch.device
) -> DecoderInputs:
    """Ids with placeholders to the decoder's inputs, all rows ending at the last position."""
    rows = []
    for prompt in prompts:
        row: list[int] = []
        for i in prompt:
            row += [IMAGE_TOKEN_ID] * tokens_per_image if i == IMAGE_TOKEN_ID else [i]
        rows.append(row)
    b, s = len(rows), max(map(len, rows))
    ids = torch.tensor([[0] * (s - len(row)) + row for row in rows])
    vision = ids == IMAGE_TOKEN_ID
    row, position = vision.nonzero(as_tuple=True)  # row after row, as the images come
    first = torch.tensor([s - len(row) for row in rows]).unsqueeze(1)
    valid = torch.arange(s) >= first
    # A padding position sees itself, since a softmax over nothing is NaN in some attention kernels.
    causal = torch.ones(s, s, dtype=torch.bool).tril()
    allowed = (causal & valid.unsqueeze(1)) | torch.eye(s, dtype=torch.bool)
    return DecoderInputs(
        tokens=ids.masked_fill(vision, 0).to(device),
        modality=vision.long().to(device),
        position_ids=(torch.arange(s) - first).clamp(min=0).to(device),
        vision_token_index=(position * b + row).to(device),
        valid=valid.to(device),
        attention_mask=allowed.unsqueeze(1).to(device),
    )
