"""Triton kernel of rotary positions: a program has all heads of one token."""

import torch
import triton
import triton.language as tl


@triton.jit
def _turn(x, y, cos, sin, heads, head_stride, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """All heads at x to y, in LLaMA's rotate-half order; cos and sin [1, HALF] in fp32."""
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    source = x + head * head_stride + column
    low = tl.load(source, mask=inside, other=0.0)
    wide_low = low.to(tl.float32)
    wide_high = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target = y + head * half * 2 + column
    tl.store(target, (wide_low * cos - wide_high * sin).to(low.dtype), mask=inside)
    tl.store(target + half, (wide_high * cos + wide_low * sin).to(low.dtype), mask=inside)


@triton.jit
def _rotate(
    query,
    key,
    cos,
    sin,
    turned_query,
    turned_key,
    batch,
    heads,
    query_s,
    query_b,
    query_head,
    kv_heads,
    key_s,
    key_b,
    key_head,
    half,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    column = tl.arange(0, HALF)[None, :]
    # The halves of the tables are equal.
    place = token * half * 2 + column
    c = tl.load(cos + place, mask=column < half, other=0.0).to(tl.float32)
    n = tl.load(sin + place, mask=column < half, other=0.0).to(tl.float32)
    if BACK:
        n = -n
    _turn(
        query + s * query_s + b * query_b,
        turned_query + token * heads * half * 2,
        c,
        n,
        heads,
        query_head,
        half,
        HEADS,
        HALF,
    )
    _turn(
        key + s * key_s + b * key_b,
        turned_key + token * kv_heads * half * 2,
        c,
        n,
        kv_heads,
        key_head,
        half,
        KV_HEADS,
        HALF,
    )


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    turned_query: torch.Tensor,
    turned_key: torch.Tensor,
    *,
    back: bool,
) -> None:
    """Fill the turned query and key; see `rotary.rotate`."""
    s, b, heads, size = query.shape
    if not query.numel():
        return
    _rotate[(s * b,)](
        query,
        key,
        cos,
        sin,
        turned_query,
        turned_key,
        b,
        heads,
        *query.stride()[:3],
        key.shape[2],
        *key.stride()[:3],
        size // 2,
        BACK=back,
        HEADS=triton.next_power_of_2(heads),
        KV_HEADS=triton.next_power_of_2(key.shape[2]),
        HALF=triton.next_power_of_2(size // 2),
    )
