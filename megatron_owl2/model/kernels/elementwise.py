"""Elementwise operations of the model, apart from its GEMMs and attention.

They do little arithmetic and move much: norm, rotary positions, activations and the loss take a
quarter of a layer's time on a GPU where every operation of torch is a kernel of its own. The two
implementations are torch's operations (plain.py) and one Triton kernel per operation and pass
(fused/); which of them is chosen here alone, for any backend of the GEMMs.
"""

import importlib.util
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.mcore.setup import on_cpu

Rotary = tuple[torch.Tensor, torch.Tensor]


class Elementwise(Protocol):
    """Interface of the elementwise operations; an object of it has no state."""

    def modality_norm(
        self,
        x: torch.Tensor,
        is_vision: torch.Tensor,
        eps: float,
        text: torch.Tensor,
        vision: torch.Tensor | None,
    ) -> torch.Tensor:
        """RMSNorm of x [s, b, h] times `vision` [h] where is_vision (bool [s, b, 1]), else `text`;
        times `text` everywhere without `vision`.

        x is normalised in fp32 and cast back before it is scaled, as LLaMA does."""
        ...

    def rms_norm(self, x: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of x [..., h] times weight [h], with the rounding of `modality_norm`."""
        ...

    def split_qkv(
        self,
        qkv: torch.Tensor,
        kv_vision: torch.Tensor | None,
        vision_token_index: torch.Tensor,
        rotary: Rotary,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [s, b, heads, d], key and value [s, b, groups, d] of a projection's output qkv
        [s * b, groups, queries + 2, d], a group being the queries that share a key, it and its
        value.

        With kv_vision [n, groups, 2, d] keys and values of the tokens `vision_token_index` [n] of
        s * b are those. Queries and keys are turned by their positions, in the rotate-half order
        of LLaMA; `rotary` is cos and sin [s, b, 1, d], of equal halves."""
        ...

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gates) * values of gate_up [..., 2 * f], gates before values; [..., f]."""
        ...

    def quick_gelu(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """CLIP's activation y * sigmoid(1.702 y) of y = x + bias, x [..., f] and bias [f]."""
        ...

    def cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup
    ) -> torch.Tensor:
        """Cross entropy fp32 of labels int64 [...] under logits [..., vocab/tp] of the ranks of
        the tensor-parallel `group`. The backward pass may leave the gradient in `logits`, which
        nothing else may read then. A label that is no word takes part with no logit."""
        ...


def build_elementwise(context: ParallelContext) -> Elementwise:
    """The elementwise operations that `kernels.elementwise` names; auto is fused on a GPU where
    Triton is installed (torch brings it), else plain."""
    chosen = context.elementwise
    if chosen == "auto":
        found = not on_cpu() and importlib.util.find_spec("triton") is not None
        chosen = "fused" if found else "plain"
    if chosen == "fused":
        from megatron_owl2.model.kernels.fused import FusedElementwise

        return FusedElementwise()
    from megatron_owl2.model.kernels.plain import PlainElementwise

    return PlainElementwise()
