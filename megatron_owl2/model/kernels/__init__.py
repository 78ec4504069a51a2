"""Kernels of the decoder's layers: torch's, or Transformer Engine's in bf16 and FP8.

A backend is a class with the methods of `Kernels`, a case of `build_kernels`, and a name in the
schema (config/schema.py). GEMMs and attention of ViT and abstractor are always torch's. Norms,
activations and the loss are chosen apart, for any backend (elementwise.py): Transformer Engine's
norms are faster by casting to FP8 in the norm's kernel, and between a split norm and that cast
stands the choice of the weight by modality. And they do not round to bf16 before the weight, as
LLaMA does.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from megatron_owl2.mcore.linear import LinearSpec
from megatron_owl2.mcore.parallel import ParallelContext


class Kernels(Protocol):
    """Interface of a kernel backend; one object serves all decoder layers of a model chunk."""

    gemm_row_alignment: int  # the rows of every GEMM must be a multiple of it

    def ColumnLinear(self, context: ParallelContext, spec: LinearSpec) -> nn.Module:
        """Linear [..., in] to [..., out / tp], as `mcore.linear.ColumnLinear`."""
        ...

    def RowLinear(self, context: ParallelContext, spec: LinearSpec) -> nn.Module:
        """Linear [..., in / tp] to [..., out], as `mcore.linear.RowLinear`."""
        ...

    def attention(self, context: ParallelContext, number: int) -> nn.Module:
        """Causal attention of decoder layer `number`, as `local.Attention`."""
        ...

    def fp8_context(self) -> AbstractContextManager:
        """FP8 context of a pass through all layers of a model chunk."""
        ...

    def layer_fp8_context(self, number: int) -> AbstractContextManager:
        """FP8 context of a pass through layer `number`."""
        ...

    def checkpoint(self, function: Callable, *inputs: Any, use_reentrant: bool = False) -> Any:
        """function(*inputs), computed again in the backward pass with the same scales;
        `use_reentrant` as in torch.utils.checkpoint."""
        ...


def build_kernels(context: ParallelContext) -> Kernels:
    """The kernels that `kernels.backend` names, for the run's precision."""
    if context.backend == "transformer_engine":
        from megatron_owl2.model.kernels.transformer_engine import TransformerEngineKernels

        return TransformerEngineKernels(context)
    from megatron_owl2.model.kernels.local import LocalKernels

    return LocalKernels()
