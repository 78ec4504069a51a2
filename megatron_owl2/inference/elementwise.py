"""Elementwise operations of a model that only answers, on a CPU: few calls, and no gradients.

At one token a call costs more than its arithmetic.
"""

import torch
from torch.nn import functional as F

from megatron_owl2.model.kernels.elementwise import Rotary
from megatron_owl2.model.kernels.plain import PlainElementwise


class InferenceElementwise(PlainElementwise):
    """Operations of torch without gradients; see `Elementwise` for shapes."""

    def modality_norm(
        self,
        x: torch.Tensor,
        is_vision: torch.Tensor,
        eps: float,
        text: torch.Tensor,
        vision: torch.Tensor | None,
    ) -> torch.Tensor:
        weight = text if vision is None else torch.where(is_vision, vision, text)
        return _normalized(x, eps).mul_(weight)

    def rms_norm(self, x: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
        return _normalized(x, eps).mul_(weight)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gates, values = gate_up.chunk(2, dim=-1)
        return F.silu(gates).mul_(values)

    def split_qkv(
        self,
        qkv: torch.Tensor,
        kv_vision: torch.Tensor | None,
        vision_token_index: torch.Tensor,
        rotary: Rotary,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if kv_vision is not None:
            qkv[:, :, -2:].index_copy_(0, vision_token_index, kv_vision)
        s, b = rotary[0].shape[:2]
        groups, queries, size = qkv.shape[1], qkv.shape[2] - 2, qkv.shape[3]
        whole = qkv.view(s, b, groups, queries + 2, size)
        cos, sin = (table.unsqueeze(3) for table in rotary)
        result = rotated(whole[..., :-1, :], cos, sin[..., : size // 2])
        query = result[..., :-1, :].reshape(s, b, groups * queries, size)
        return query, result[..., -1, :], whole[..., -1, :]


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys [..., d] turned by their positions, with cos [..., d] and the first half of
    sin, [..., d / 2], which the second equals."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    result = x * cos
    result[..., :half].addcmul_(high, sin, value=-1)
    result[..., half:].addcmul_(low, sin)
    return result


def _normalized(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in fp32, in x's dtype."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    normed = x * scale
    return normed if normed.dtype == x.dtype else normed.to(x.dtype)
