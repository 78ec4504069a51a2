"""Triton kernels of the norm: one row per program forward, rows in turn backward."""

import torch
import triton
import triton.language as tl


@triton.jit
def _forward(x, text, vision, is_vision, y, size, eps, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row * size + columns, mask=inside, other=0.0)
    weight = text
    if SPLIT:
        seen = tl.load(is_vision + row).to(tl.int32)
        if seen != 0:
            weight = vision
    wide = values.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    normed = (wide * inverse_rms).to(values.dtype).to(tl.float32)
    scaled = normed * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + columns, scaled.to(values.dtype), mask=inside)


@triton.jit
def _backward(
    grad,
    x,
    text,
    vision,
    is_vision,
    grad_x,
    partial,
    rows,
    size,
    eps,
    SPLIT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, groups = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    of_text = tl.zeros([BLOCK], dtype=tl.float32)
    of_vision = tl.zeros([BLOCK], dtype=tl.float32)
    # 64 bits from here on: rows * size may be more than 2^31.
    place = group.to(tl.int64) * size
    for row in range(group, rows, groups):
        values = tl.load(x + place + columns, mask=inside, other=0.0)
        upper = tl.load(grad + place + columns, mask=inside, other=0.0).to(tl.float32)
        weight = text
        seen = 0
        if SPLIT:
            seen = tl.load(is_vision + row).to(tl.int32)
            if seen != 0:
                weight = vision
        wide = values.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
        normed = wide * inverse_rms
        inner = upper * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        along = tl.sum(inner * normed, 0) / size
        found = (inner - normed * along) * inverse_rms
        tl.store(grad_x + place + columns, found.to(values.dtype), mask=inside)
        if WEIGHTS:
            share = upper * normed.to(values.dtype).to(tl.float32)
            of_text += tl.where(seen != 0, 0.0, share)
            if SPLIT:
                of_vision += tl.where(seen != 0, share, 0.0)
        place += groups.to(tl.int64) * size
    if WEIGHTS:
        place = group.to(tl.int64) * size
        tl.store(partial + place + columns, of_text, mask=inside)
        if SPLIT:
            place += groups.to(tl.int64) * size
            tl.store(partial + place + columns, of_vision, mask=inside)


def forward(
    x: torch.Tensor,
    text: torch.Tensor,
    vision: torch.Tensor | None,
    is_vision: torch.Tensor | None,
    y: torch.Tensor,
    eps: float,
) -> None:
    """Fill y, all contiguous; see `norm.rms_norm`."""
    size = x.shape[-1]
    rows = x.numel() // size
    if rows == 0:
        return
    block, warps = _block(size)
    split = vision is not None
    _forward[(rows,)](
        x, text, vision, is_vision, y, size, eps, SPLIT=split, BLOCK=block, num_warps=warps
    )


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    text: torch.Tensor,
    vision: torch.Tensor | None,
    is_vision: torch.Tensor | None,
    grad_x: torch.Tensor,
    partial: torch.Tensor,
    eps: float,
    groups: int,
) -> None:
    """Fill grad_x and partial, all contiguous, by so many programs; `norm.rms_norm_backward`."""
    size = x.shape[-1]
    rows = x.numel() // size
    if rows == 0:
        return
    block, warps = _block(size)
    _backward[(groups,)](
        grad,
        x,
        text,
        vision,
        is_vision,
        grad_x,
        partial,
        rows,
        size,
        eps,
        SPLIT=vision is not None,
        WEIGHTS=partial.numel() > 0,
        BLOCK=block,
        num_warps=warps,
    )


def _block(size: int) -> tuple[int, int]:
    """Columns of a program's row, a power of two, and the warps for them."""
    block = triton.next_power_of_2(size)
    return block, min(max(block // 512, 1), 16)
