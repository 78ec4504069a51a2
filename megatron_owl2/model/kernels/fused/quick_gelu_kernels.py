"""Triton kernels of quick-GELU: a program has some columns, of one row forward, of rows in turn
backward."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _forward(x, bias, y, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row * size + columns, mask=inside, other=0.0)
    wide = values.to(tl.float32) + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    found = wide * tl.sigmoid(1.702 * wide)
    tl.store(y + row * size + columns, found.to(values.dtype), mask=inside)


@triton.jit
def _backward(grad, x, bias, grad_x, partial, rows, size, BLOCK: tl.constexpr):
    group, groups = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    # 64 bits from here on: rows * size may be more than 2^31.
    place = group.to(tl.int64) * size
    for _ in range(group, rows, groups):
        values = tl.load(x + place + columns, mask=inside, other=0.0)
        upper = tl.load(grad + place + columns, mask=inside, other=0.0).to(tl.float32)
        wide = values.to(tl.float32) + shift
        share = tl.sigmoid(1.702 * wide)
        found = upper * share * (1.0 + 1.702 * wide * (1.0 - share))
        tl.store(grad_x + place + columns, found.to(values.dtype), mask=inside)
        total += found
        place += groups.to(tl.int64) * size
    tl.store(partial + group.to(tl.int64) * size + columns, total, mask=inside)


def forward(x: torch.Tensor, bias: torch.Tensor, y: torch.Tensor) -> None:
    """Fill y, all contiguous."""
    size = x.shape[-1]
    if x.numel():
        grid = x.numel() // size, triton.cdiv(size, BLOCK)
        _forward[grid](x, bias, y, size, BLOCK=BLOCK)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor,
    grad_x: torch.Tensor,
    partial: torch.Tensor,
) -> None:
    """Fill grad_x and partial [groups, f], all contiguous."""
    size = x.shape[-1]
    if x.numel():
        grid = len(partial), triton.cdiv(size, BLOCK)
        _backward[grid](grad, x, bias, grad_x, partial, x.numel() // size, size, BLOCK=BLOCK)
