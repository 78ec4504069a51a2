"""Elementwise operations of one Triton kernel each way, for GPUs.

An operation is an operator of torch (`torch.library`), so that passes without storage know its
sizes, with a rule for its gradient that keeps inputs alone; its kernels lie beside it in a file of
their own, which is imported at the first launch, for planning needs no Triton. All compute in fp32
and round once, but for the norm, which rounds where LLaMA does.

Why not what is there: megatron-core's SwiGLU and cross entropy are torch.compile'd, which compiles
again for new lengths and cannot be run on a machine without a compiler, and its cross entropy
copies the logits to fp32; Transformer Engine's are there with Transformer Engine only, and none of
either chooses a norm's weight by token. Triton comes with torch for GPUs, and its interpreter runs
the same kernels in the tests.
"""

import torch
from torch.distributed import ProcessGroup

from megatron_owl2.model.kernels.elementwise import Rotary
from megatron_owl2.model.kernels.fused.cross_entropy import CrossEntropy
from megatron_owl2.model.kernels.fused.norm import RMSNorm
from megatron_owl2.model.kernels.fused.qkv import SplitQKV
from megatron_owl2.model.kernels.fused.quick_gelu import QuickGELU
from megatron_owl2.model.kernels.fused.swiglu import SwiGLU


class FusedElementwise:
    """Fused operations; see `Elementwise` for shapes. Inputs that are not contiguous are copied
    where a kernel cannot follow their strides."""

    def modality_norm(
        self,
        x: torch.Tensor,
        is_vision: torch.Tensor,
        eps: float,
        text: torch.Tensor,
        vision: torch.Tensor | None,
    ) -> torch.Tensor:
        return RMSNorm.apply(x, eps, text, vision, None if vision is None else is_vision)

    def rms_norm(self, x: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
        return RMSNorm.apply(x, eps, weight, None, None)

    def split_qkv(
        self,
        qkv: torch.Tensor,
        kv_vision: torch.Tensor | None,
        vision_token_index: torch.Tensor,
        rotary: Rotary,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return SplitQKV.apply(qkv, kv_vision, vision_token_index, *rotary)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return SwiGLU.apply(gate_up)

    def quick_gelu(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return QuickGELU.apply(x, bias)

    def cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup
    ) -> torch.Tensor:
        return CrossEntropy.apply(logits, labels, group)
