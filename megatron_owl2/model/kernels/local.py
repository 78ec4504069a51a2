"""Kernels of torch: megatron-core's linears, scaled dot-product attention."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from megatron_owl2.mcore import context_parallel
from megatron_owl2.mcore.linear import ColumnLinear, RowLinear
from megatron_owl2.mcore.packed_sequences import PackedSequences
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.attention import AttentionMask, attend, attend_packed
from megatron_owl2.model.layer_stack import checkpoint


class LocalKernels:
    """megatron-core's own linears and torch's attention."""

    ColumnLinear = ColumnLinear
    RowLinear = RowLinear
    gemm_row_alignment = 1

    def attention(self, context: ParallelContext, number: int) -> nn.Module:
        return Attention(context)

    def fp8_context(self) -> AbstractContextManager:
        return nullcontext()

    def layer_fp8_context(self, number: int) -> AbstractContextManager:
        return nullcontext()

    def checkpoint(self, function: Callable, *inputs: Any, use_reentrant: bool = False) -> Any:
        return checkpoint(function, *inputs, use_reentrant=use_reentrant)


class Attention(nn.Module):
    """Causal attention; under context parallelism over the keys and values of all its ranks.

    query [s, b, heads, d], key and value [s, b, kv_heads, d], s being this rank's share; returns
    [s, b, heads * d]. `mask` says more than causality: the sequences of packed rows, or, for one
    rank only, bool [b, 1, s, s'].
    """

    def __init__(self, context: ParallelContext):
        super().__init__()
        self.context = context

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: AttentionMask | None = None,
    ) -> torch.Tensor:
        group = self.context.groups.cp
        if group.size() == 1:
            if isinstance(mask, PackedSequences):
                return attend_packed(query, key, value, mask)
            return attend(query, key, value, causal=mask is None, mask=mask)
        length = len(query) * group.size()
        own, *_ = places = [
            context_parallel.positions(length, rank, group.size(), query.device)
            for rank in (group.rank(), *range(group.size()))
        ]
        # Keys stay in the order of the ranks; only the mask asks where they belong.
        others = torch.cat(places[1:])
        allowed = own.unsqueeze(1) >= others
        if isinstance(mask, PackedSequences):
            numbers = mask.numbers(query.device)
            allowed = allowed & (numbers[:, own].unsqueeze(2) == numbers[:, others].unsqueeze(1))
            allowed = allowed.unsqueeze(1)
        key, value = self.context.gather_context(key), self.context.gather_context(value)
        return attend(query, key, value, mask=allowed)
