"""Triton kernels of SwiGLU: a program has some columns of one row."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _forward(gate_up, y, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gates = tl.load(gate_up + row * size * 2 + columns, mask=inside, other=0.0)
    values = tl.load(gate_up + row * size * 2 + size + columns, mask=inside, other=0.0)
    wide = gates.to(tl.float32)
    gated = wide * tl.sigmoid(wide) * values.to(tl.float32)
    tl.store(y + row * size + columns, gated.to(gates.dtype), mask=inside)


@triton.jit
def _backward(grad, gate_up, grad_gate_up, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    upper = tl.load(grad + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate_up + row * size * 2 + columns, mask=inside, other=0.0)
    values = tl.load(gate_up + row * size * 2 + size + columns, mask=inside, other=0.0)
    wide = gates.to(tl.float32)
    open_share = tl.sigmoid(wide)
    of_values = upper * wide * open_share
    of_gates = upper * values.to(tl.float32) * open_share * (1.0 + wide * (1.0 - open_share))
    place = grad_gate_up + row * size * 2 + columns
    tl.store(place, of_gates.to(gates.dtype), mask=inside)
    tl.store(place + size, of_values.to(gates.dtype), mask=inside)


def forward(gate_up: torch.Tensor, y: torch.Tensor) -> None:
    """Fill y, both contiguous."""
    if y.numel():
        _forward[_grid(y)](gate_up, y, y.shape[-1], BLOCK=BLOCK)


def backward(grad: torch.Tensor, gate_up: torch.Tensor, grad_gate_up: torch.Tensor) -> None:
    """Fill grad_gate_up, all contiguous."""
    if grad.numel():
        _backward[_grid(grad)](grad, gate_up, grad_gate_up, grad.shape[-1], BLOCK=BLOCK)


def _grid(y: torch.Tensor) -> tuple[int, int]:
    size = y.shape[-1]
    return y.numel() // size, triton.cdiv(size, BLOCK)
