"""Scaled dot-product attention on sequence-first tensors, for ViT, abstractor and decoder."""

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_owl2.mcore.packed_sequences import PackedSequences

AttentionMask = (
    torch.Tensor | PackedSequences
)  # bool, True where allowed; or a block for each sequence


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v with the softmax in fp32.

    query [sq, b, heads, d], key and value [sk, b, kv_heads, d] with kv_heads dividing heads;
    mask bool, True where attention is allowed, broadcast to [b, heads, sq, sk]. Returns
    [sq, b, heads * d]. `causal` and `mask` exclude each other.
    """
    out = scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.permute(2, 0, 1, 3).flatten(2)


def attend_dropping(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: Callable[[torch.Size], torch.Tensor],
    dropout: float,
) -> torch.Tensor:
    """`attend` without a mask and with as many heads on both sides, of whose probabilities only
    those stay that `keep` chooses, a bool of their shape [b, heads, sq, sk]; these grow by
    1 / (1 - dropout)."""
    heads = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
    scores = heads[0] @ heads[1].transpose(-1, -2) * query.shape[-1] ** -0.5
    probabilities = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    probabilities = probabilities * keep(probabilities.shape) / (1 - dropout)
    return (probabilities @ heads[2]).permute(2, 0, 1, 3).flatten(2)


def attend_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences
) -> torch.Tensor:
    """Causal attention within each sequence of packed rows, without a mask of s x s.

    Shapes are those of `attend`, with sk = sq = s, for rows that `packed` describes.
    """
    rows = []
    for row, lengths in enumerate(packed.lengths):
        one = slice(row, row + 1)
        pieces = (x[:, one].split(lengths) for x in (query, key, value))
        rows.append(torch.cat([attend(*piece, causal=True) for piece in zip(*pieces, strict=True)]))
    return torch.cat(rows, dim=1)
