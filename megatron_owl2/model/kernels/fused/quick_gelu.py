"""Quick-GELU of a linear's output and its bias, with the gradient to the bias."""

from typing import Any

import torch
from torch.library import custom_op

MOST_GROUPS = 128  # of rows, whose sums of the bias's gradient are added up at the end


@custom_op("megatron_owl2::quick_gelu", mutates_args=())
def quick_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """y * sigmoid(1.702 y) of y = x + bias, x [..., f] and bias [f]."""
    from megatron_owl2.model.kernels.fused import quick_gelu_kernels

    y = torch.empty_like(x)
    quick_gelu_kernels.forward(x, bias, y)
    return y


@quick_gelu.register_fake
def _(x, bias):
    return torch.empty_like(x)


@custom_op("megatron_owl2::quick_gelu_backward", mutates_args=())
def quick_gelu_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient to x, and that to the bias by group of rows, fp32 [groups, f]."""
    from megatron_owl2.model.kernels.fused import quick_gelu_kernels

    grad_x, partial = torch.empty_like(x), _partial(x)
    quick_gelu_kernels.backward(grad, x, bias, grad_x, partial)
    return grad_x, partial


@quick_gelu_backward.register_fake
def _(grad, x, bias):
    return torch.empty_like(x), _partial(x)


def _partial(x: torch.Tensor) -> torch.Tensor:
    size = x.shape[-1]
    return x.new_empty((min(MOST_GROUPS, x.numel() // size), size), dtype=torch.float32)


class QuickGELU(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x, bias = x.contiguous(), bias.contiguous()
        ctx.save_for_backward(x, bias)
        return quick_gelu(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, bias = ctx.saved_tensors
        grad_x, partial = quick_gelu_backward(grads[0].contiguous(), x, bias)
        return grad_x, partial.sum(0).to(bias.dtype)
