"""Queries, keys and values from the outputs of their projections: split, vision rows put in, rotary
positions applied.

One kernel serves all tokens and one the vision tokens. The gradient of a rotation is the rotation
by the negated sine, so nothing but indices and tables is kept.
"""

from typing import Any

import torch
from torch.library import custom_op


@custom_op("megatron_owl2::split_qkv", mutates_args=())
def split_qkv(
    qkv: torch.Tensor,
    kv_vision: torch.Tensor | None,
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value [s, b, heads, d] of qkv [s * b, groups, queries + 2, d], the keys and
    values of `rows` from kv_vision [rows, groups, 2, d]; cos and sin [s, b, 1, d] of equal halves.
    All contiguous."""
    from megatron_owl2.model.kernels.fused import qkv_kernels

    parts = _parts(qkv, cos)
    qkv_kernels.split(qkv, kv_vision, *parts, rows, cos, sin)
    return parts


@split_qkv.register_fake
def _(qkv, kv_vision, rows, cos, sin):
    return _parts(qkv, cos)


def _parts(qkv: torch.Tensor, cos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s, b = cos.shape[:2]
    _, groups, members, size = qkv.shape
    query = qkv.new_empty(s, b, groups * (members - 2), size)
    key = qkv.new_empty(s, b, groups, size)
    return query, key, torch.empty_like(key)


@custom_op("megatron_owl2::split_qkv_backward", mutates_args=())
def split_qkv_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients to qkv and to kv_vision from those to query, key and value, of any strides but
    the last; without `rows` there was no kv_vision, and its gradient is empty."""
    from megatron_owl2.model.kernels.fused import qkv_kernels

    wholes = _wholes(query, key, rows)
    qkv_kernels.join(*wholes, query, key, value, rows, cos, sin)
    return wholes


@split_qkv_backward.register_fake
def _(query, key, value, rows, cos, sin):
    return _wholes(query, key, rows)


def _wholes(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    s, b, groups, size = key.shape
    qkv = key.new_empty(s * b, groups, query.shape[2] // groups + 2, size)
    return qkv, key.new_empty(0 if rows is None else len(rows), groups, 2, size)


class SplitQKV(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        kv_vision: torch.Tensor | None,
        rows: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(None if kv_vision is None else rows, cos, sin)
        vision = None if kv_vision is None else kv_vision.contiguous()
        return split_qkv(qkv.contiguous(), vision, rows, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A head's numbers must lie side by side.
        parts = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        rows, cos, sin = ctx.saved_tensors
        qkv, kv_vision = split_qkv_backward(*parts, rows, cos, sin)
        return qkv, None if rows is None else kv_vision, None, None, None
