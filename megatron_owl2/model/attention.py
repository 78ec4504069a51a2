"""Scaled dot-product attention on sequence-first tensors, for ViT, abstractor and decoder."""

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
