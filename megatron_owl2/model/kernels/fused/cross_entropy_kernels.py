"""Triton kernels of the cross entropy: a row per program forward, some columns of one backward."""

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _forward(logits, labels, found, rows, size, first, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    highest = float("-inf")
    total = 0.0
    for begin in range(0, size, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        values = tl.load(logits + columns, mask=columns < size, other=float("-inf"))
        wide = values.to(tl.float32)
        higher = tl.maximum(highest, tl.max(wide, 0))
        # All logits so far may be -inf, those of padding.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(wide - base), 0)
        highest = higher
    base = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(found + row, base + tl.log(total))
    label = tl.load(labels + row) - first
    here = (label >= 0) & (label < size)
    logit = tl.load(logits + label, mask=here, other=0.0).to(tl.float32)
    tl.store(found + rows + row, logit)


@triton.jit
def _backward(grad, logits, labels, log_sum, size, first, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(logits + columns, mask=inside, other=0.0)
    share = tl.exp(values.to(tl.float32) - tl.load(log_sum + row))
    wanted = columns == tl.load(labels + row) - first
    found = tl.load(grad + row) * (share - tl.where(wanted, 1.0, 0.0))
    tl.store(logits + columns, found.to(values.dtype), mask=inside)


def forward(logits: torch.Tensor, labels: torch.Tensor, found: torch.Tensor, first: int) -> None:
    """Fill found [2, rows], all contiguous."""
    rows, size = logits.shape
    if rows:
        _forward[(rows,)](logits, labels, found, rows, size, first, BLOCK=BLOCK, num_warps=8)


def backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    log_sum: torch.Tensor,
    first: int,
) -> None:
    """Put the gradient into logits, all contiguous."""
    rows, size = logits.shape
    if rows:
        grid = rows, triton.cdiv(size, BLOCK)
        _backward[grid](grad, logits, labels, log_sum, size, first, BLOCK=BLOCK, num_warps=8)
