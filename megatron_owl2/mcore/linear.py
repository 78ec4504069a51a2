"""Tensor-parallel linears and the vocabulary embedding, on megatron-core's.

A linear takes [..., in] and returns [..., out]; megatron-core's own return a bias beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)

from megatron_owl2.mcore.parallel import ParallelContext


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """Sizes and options of one linear, whichever kernels compute it.

    `sequence_parallel`: input (column) or output (row) is split along the sequence, if the run
    splits sequences. `share_input`: the input comes from `ParallelContext.copy_to_tensor_parallel`
    and is read by other linears too. `stride`: the weight is so many equal blocks, each split over
    the ranks (2 for gate and up). `padding`: so many of the `outputs`, the last, are of no use;
    their weights start at zero. `skip_bias`: the bias is for who reads the output to add. The last
    four are for column linears, `padding` and `skip_bias` for the one here. `user_buffer`: its name
    in Transformer Engine, which `parallel.tensor_overlap` needs.
    """

    inputs: int
    outputs: int
    bias: bool = False
    init_std: float
    sequence_parallel: bool = False
    share_input: bool = False
    stride: int = 1
    padding: int = 0
    skip_bias: bool = False
    user_buffer: Literal["proj", "fc1", "fc2"] | None = None

    def __post_init__(self):
        if self.share_input and self.sequence_parallel:
            raise ValueError("a shared input was gathered already; leave out sequence_parallel")


class ColumnLinear(ColumnParallelLinear):
    """y = x W^T + b with W [out, in] split by rows over the tensor-parallel ranks."""

    def __init__(self, context: ParallelContext, spec: LinearSpec):
        super().__init__(
            spec.inputs,
            spec.outputs,
            config=context.transformer if spec.sequence_parallel else context.replicated,
            init_method=normal_init(spec.init_std, spec.padding),
            bias=spec.bias,
            stride=spec.stride,
            skip_bias_add=spec.skip_bias,
            disable_grad_reduce=spec.share_input,
            tp_group=context.groups.tp,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """y = x W^T + b with x [..., in/tp] and W [out, in] split by columns; summed over the ranks."""

    def __init__(self, context: ParallelContext, spec: LinearSpec):
        super().__init__(
            spec.inputs,
            spec.outputs,
            config=context.transformer if spec.sequence_parallel else context.replicated,
            init_method=normal_init(spec.init_std),
            bias=spec.bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=context.groups.tp,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class VocabEmbedding(VocabParallelEmbedding):
    """Token ids [b, s] to embeddings [b, s, h], the vocabulary split over the ranks.

    The last `padding` of the `rows` are no token's and start at zero.
    """

    def __init__(
        self,
        context: ParallelContext,
        rows: int,
        hidden_size: int,
        *,
        init_std: float,
        padding: int = 0,
    ):
        super().__init__(
            rows,
            hidden_size,
            init_method=normal_init(init_std, padding),
            config=context.replicated,
            tp_group=context.groups.tp,
        )


def normal_init(std: float, padding: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Initialisation of a whole weight from a normal distribution with mean 0 and the given
    deviation, but for its last `padding` rows, which are zero and draw no random numbers."""

    def init(weight: torch.Tensor) -> torch.Tensor:
        used = len(weight) - padding
        with torch.no_grad():
            weight[used:] = 0
            torch.nn.init.normal_(weight[:used], mean=0.0, std=std)
        return weight

    return init
