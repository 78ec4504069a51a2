"""Triton kernels of queries, keys and values: a program has all heads of one token."""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _move(source, target, inside, half, cos, sin, ROTATE: tl.constexpr):
    """Heads [HEADS, HALF] from source to target, turned in LLaMA's rotate-half order; cos and sin
    are fp32 [1, HALF]."""
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + half, mask=inside, other=0.0)
    if ROTATE:
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        low = (wide_low * cos - wide_high * sin).to(low.dtype)
        high = (wide_high * cos + wide_low * sin).to(high.dtype)
    tl.store(target, low, mask=inside)
    tl.store(target + half, high, mask=inside)


@triton.jit
def _exchange(whole, part, inside, half, cos, sin, ROTATE: tl.constexpr, BACK: tl.constexpr):
    """From the projection's output to query, key or value, or their gradients back."""
    if BACK:
        _move(part, whole, inside, half, cos, -sin, ROTATE)
    else:
        _move(whole, part, inside, half, cos, sin, ROTATE)


@triton.jit
def _all_tokens(
    qkv,
    query,
    key,
    value,
    cos,
    sin,
    batch,
    groups,
    queries,
    half,
    query_s,
    query_b,
    query_head,
    key_s,
    key_b,
    key_head,
    value_s,
    value_b,
    value_head,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    column = tl.arange(0, HALF)[None, :]
    # The halves of the tables are equal.
    c = tl.load(cos + token * half * 2 + column, mask=column < half, other=0.0).to(tl.float32)
    n = tl.load(sin + token * half * 2 + column, mask=column < half, other=0.0).to(tl.float32)
    members = queries + 2
    qkv += token * groups * members * half * 2

    head = tl.arange(0, HEADS)[:, None]
    whole = qkv + (head // queries * members + head % queries) * half * 2 + column
    part = query + s * query_s + b * query_b + head * query_head + column
    inside = (head < groups * queries) & (column < half)
    _exchange(whole, part, inside, half, c, n, True, BACK)

    group = tl.arange(0, GROUPS)[:, None]
    whole = qkv + (group * members + queries) * half * 2 + column
    inside = (group < groups) & (column < half)
    part = key + s * key_s + b * key_b + group * key_head + column
    _exchange(whole, part, inside, half, c, n, True, BACK)
    part = value + s * value_s + b * value_b + group * value_head + column
    _exchange(whole + half * 2, part, inside, half, c, n, False, BACK)


@triton.jit
def _vision_tokens(
    kv,
    qkv,
    key,
    value,
    rows,
    cos,
    sin,
    batch,
    groups,
    queries,
    half,
    key_s,
    key_b,
    key_head,
    value_s,
    value_b,
    value_head,
    BACK: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Keys and values of vision tokens instead of those of the text's projection; back, the latter
    have no gradient (qkv)."""
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(rows + place)
    s, b = token // batch, token % batch
    column = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + token * half * 2 + column, mask=column < half, other=0.0).to(tl.float32)
    n = tl.load(sin + token * half * 2 + column, mask=column < half, other=0.0).to(tl.float32)
    group = tl.arange(0, GROUPS)[:, None]
    inside = (group < groups) & (column < half)
    whole = kv + (place * groups + group) * half * 4 + column
    part = key + s * key_s + b * key_b + group * key_head + column
    _exchange(whole, part, inside, half, c, n, True, BACK)
    part = value + s * value_s + b * value_b + group * value_head + column
    _exchange(whole + half * 2, part, inside, half, c, n, False, BACK)
    if BACK:
        members = queries + 2
        unused = qkv + ((token * groups + group) * members + queries) * half * 2 + column
        nothing = tl.zeros([GROUPS, HALF], dtype=qkv.dtype.element_ty)
        for quarter in tl.static_range(4):
            tl.store(unused + quarter * half, nothing, mask=inside)


def split(
    qkv: torch.Tensor,
    kv_vision: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """Fill query, key and value; see `qkv.split_qkv`."""
    rows_of_vision = None if kv_vision is None else rows
    _launch(qkv, kv_vision, query, key, value, rows_of_vision, cos, sin, back=False)


def join(
    qkv: torch.Tensor,
    kv_vision: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """Fill the gradients qkv and kv_vision; see `qkv.split_qkv_backward`."""
    _launch(qkv, kv_vision, query, key, value, rows, cos, sin, back=True)


def _launch(qkv, kv_vision, query, key, value, rows, cos, sin, *, back: bool) -> None:
    tokens, groups, members, size = qkv.shape
    if not qkv.numel():
        return
    sizes = query.shape[1], groups, members - 2, size // 2
    key_and_value = *key.stride()[:3], *value.stride()[:3]
    blocks: dict[str, Any] = {
        "BACK": back,
        "GROUPS": triton.next_power_of_2(groups),
        "HALF": triton.next_power_of_2(size // 2),
    }
    _all_tokens[(tokens,)](
        qkv,
        query,
        key,
        value,
        cos,
        sin,
        *sizes,
        *query.stride()[:3],
        *key_and_value,
        HEADS=triton.next_power_of_2(query.shape[2]),
        **blocks,
    )
    if rows is not None and len(rows):
        _vision_tokens[(len(rows),)](
            kv_vision, qkv, key, value, rows, cos, sin, *sizes, *key_and_value, **blocks
        )
