"""Scaled dot-product attention on sequence-first tensors, for ViT, abstractor and decoder."""

import torch
from torch.nn.functional import scaled_dot_product_attention


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
