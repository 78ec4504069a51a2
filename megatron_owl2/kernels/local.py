"""torch's own kernels."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_owl2 import context, mcore
from megatron_owl2.mcore import Layout
from megatron_owl2.model.attention import attend


class LocalKernels:
    """megatron-core's own linears and torch's attention."""

    ColumnLinear = mcore.ColumnLinear
    RowLinear = mcore.RowLinear
    row_multiple = 1  # rows of every GEMM must be a multiple of it

    def attention(self, layout: Layout, number: int) -> nn.Module:
        """Causal attention of decoder layer `number`."""
        return Attention(layout)

    def around_layers(self):
        """A context for a pass through all layers of a stage."""
        return nullcontext()

    def around_layer(self, number: int):
        """A context for a pass through one layer."""
        return nullcontext()

    def checkpoint(self, function, *inputs):
        """function(*inputs), computed again in the backward pass."""
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Attention(nn.Module):
    """Causal attention; under context parallelism over the keys and values of all its ranks.

    query [s, b, heads, d], key and value [s, b, kv_heads, d], s being this rank's share; returns
    [s, b, heads * d]. `mask` (bool [b, 1, s, s']) says more than causality, for one rank only.
    """

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        group = self.layout.groups.cp
        if group.size() == 1:
            return attend(query, key, value, causal=mask is None, mask=mask)
        length = len(query) * group.size()
        own, *_ = places = [
            context.positions(length, rank, group.size(), query.device)
            for rank in (group.rank(), *range(group.size()))
        ]
        # Keys stay in the order of the ranks; only the mask asks where they belong.
        causal = own.unsqueeze(1) >= torch.cat(places[1:])
        key, value = self.layout.gather_context(key), self.layout.gather_context(value)
        return attend(query, key, value, mask=causal)
