"""SwiGLU of one tensor with gates and values, which is all that is kept for the backward pass."""

from typing import Any

import torch
from torch.library import custom_op


@custom_op("megatron_owl2::swiglu", mutates_args=())
def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gates) * values of gate_up [..., 2 * f]; [..., f]."""
    from megatron_owl2.model.kernels.fused import swiglu_kernels

    y = _half(gate_up)
    swiglu_kernels.forward(gate_up, y)
    return y


@swiglu.register_fake
def _(gate_up):
    return _half(gate_up)


def _half(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@custom_op("megatron_owl2::swiglu_backward", mutates_args=())
def swiglu_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The gradient to gate_up, gates and values side by side."""
    from megatron_owl2.model.kernels.fused import swiglu_kernels

    grad_gate_up = torch.empty_like(gate_up)
    swiglu_kernels.backward(grad, gate_up, grad_gate_up)
    return grad_gate_up


@swiglu_backward.register_fake
def _(grad, gate_up):
    return torch.empty_like(gate_up)


class SwiGLU(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(grads[0].contiguous(), gate_up)
