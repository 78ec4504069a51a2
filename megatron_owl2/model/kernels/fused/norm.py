"""RMSNorm with a weight per modality, forward and backward.

The backward pass computes the root mean square again, which costs no memory traffic, so nothing
but x is kept. Gradients of the weights are summed over the rows of each program and, by torch, over
the programs.
"""

from typing import Any

import torch
from torch.library import custom_op

MOST_GROUPS = 256  # of rows; about two programs for each multiprocessor of an H100


@custom_op("megatron_owl2::rms_norm", mutates_args=())
def rms_norm(
    x: torch.Tensor,
    text: torch.Tensor,
    vision: torch.Tensor | None,
    is_vision: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """x [..., h] normalised and scaled by text [h], or by vision [h] where is_vision [rows]."""
    from megatron_owl2.model.kernels.fused import norm_kernels

    y = torch.empty_like(x)
    norm_kernels.forward(x, text, vision, is_vision, y, eps)
    return y


@rms_norm.register_fake
def _(x, text, vision, is_vision, eps):
    return torch.empty_like(x)


@custom_op("megatron_owl2::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    text: torch.Tensor,
    vision: torch.Tensor | None,
    is_vision: torch.Tensor | None,
    eps: float,
    with_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient to x, and those to the weights by group of rows: fp32 [1 or 2, groups, h], text
    before vision, without groups if not `with_weights`."""
    from megatron_owl2.model.kernels.fused import norm_kernels

    grad_x, partial = torch.empty_like(x), _partial(x, vision, with_weights)
    norm_kernels.backward(grad, x, text, vision, is_vision, grad_x, partial, eps, _groups(x))
    return grad_x, partial


@rms_norm_backward.register_fake
def _(grad, x, text, vision, is_vision, eps, with_weights):
    return torch.empty_like(x), _partial(x, vision, with_weights)


def _partial(x: torch.Tensor, vision: torch.Tensor | None, with_weights: bool) -> torch.Tensor:
    groups = _groups(x) if with_weights else 0
    kinds = 1 if vision is None else 2
    return x.new_empty((kinds, groups, x.shape[-1]), dtype=torch.float32)


def _groups(x: torch.Tensor) -> int:
    return min(MOST_GROUPS, x.numel() // x.shape[-1])


class RMSNorm(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        eps: float,
        text: torch.Tensor,
        vision: torch.Tensor | None,
        is_vision: torch.Tensor | None,
    ) -> torch.Tensor:
        x, text = x.contiguous(), text.contiguous()
        if vision is not None and is_vision is not None:
            vision, is_vision = vision.contiguous(), is_vision.contiguous()
        ctx.save_for_backward(x, text, vision, is_vision)
        ctx.eps = eps
        return rms_norm(x, text, vision, is_vision, eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, text, vision, is_vision = ctx.saved_tensors
        with_weights = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        grad_x, partial = rms_norm_backward(
            grads[0].contiguous(), x, text, vision, is_vision, ctx.eps, with_weights
        )
        if not with_weights:
            return grad_x, None, None, None, None
        of_weights = [*partial.sum(1).to(text.dtype), None][:2]
        return grad_x, None, *of_weights, None
