"""Rotary positions of queries and keys together.

The gradient of a rotation is the rotation by the negated sine, so tables are all that is kept.
"""

from typing import Any

import torch
from torch.library import custom_op


@custom_op("megatron_owl2::rotate", mutates_args=())
def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [s, b, heads, d] and key [s, b, kv_heads, d] turned, or turned `back`; any strides but
    of d. cos and sin [s, b, 1, d] of equal halves, contiguous. Results are contiguous."""
    from megatron_owl2.model.kernels.fused import rotary_kernels

    turned = _like(query, key)
    rotary_kernels.rotate(query, key, cos, sin, *turned, back=back)
    return turned


@rotate.register_fake
def _(query, key, cos, sin, back):
    return _like(query, key)


def _like(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


class Rotate(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return rotate(_rows(query), _rows(key), cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key = grads
        return *rotate(_rows(query), _rows(key), *ctx.saved_tensors, True), None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, copied where the numbers of a head do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
