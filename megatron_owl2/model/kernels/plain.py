"""Elementwise operations by torch, each a reference of the fused ones."""

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from megatron_owl2.model.kernels.elementwise import Rotary


class PlainElementwise:
    """Operations of torch; see `Elementwise` for shapes."""

    def modality_norm(
        self,
        x: torch.Tensor,
        is_vision: torch.Tensor,
        eps: float,
        text: torch.Tensor,
        vision: torch.Tensor | None,
    ) -> torch.Tensor:
        return _ModalityNorm.apply(x, is_vision, eps, text, vision)

    def rms_norm(self, x: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
        return weight * rms_normalize(x, eps)

    def split_qkv(
        self,
        qkv: torch.Tensor,
        kv_vision: torch.Tensor | None,
        vision_token_index: torch.Tensor,
        rotary: Rotary,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # One split, because its backward pass is one concatenation; slices would each be padded.
        query, key, value = qkv.split([qkv.shape[2] - 2, 1, 1], dim=2)
        if kv_vision is not None:
            key, value = (
                text.index_copy(0, vision_token_index, vision)
                for text, vision in zip((key, value), kv_vision.split(1, dim=2), strict=True)
            )
        whole = *rotary[0].shape[:2], -1, qkv.shape[-1]
        query, key, value = (part.reshape(whole) for part in (query, key, value))
        return rotate(query, rotary), rotate(key, rotary), value

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu(*gate_up.chunk(2, dim=-1))

    def quick_gelu(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return quick_gelu(x + bias)

    def cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup
    ) -> torch.Tensor:
        return vocab_parallel_cross_entropy(logits, labels)


def rms_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in fp32, in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Queries or keys [s, b, heads, d] turned by their positions."""
    cos, sin = rotary
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def swiglu(gates: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """silu(gates) * values, elementwise (Shazeer, 2020)."""
    return F.silu(gates) * values


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


class _ModalityNorm(torch.autograd.Function):
    """The formula of `modality_norm`, which keeps nothing but x for its backward pass.

    Autograd would keep the normalised x and the chosen weights too, each of x's size.
    """

    @staticmethod
    def forward(ctx, x, is_vision, eps, text, vision):
        ctx.save_for_backward(x, is_vision, text, vision)
        ctx.eps = eps
        return _weight(is_vision, text, vision) * rms_normalize(x, eps)

    @staticmethod
    def backward(ctx, grad):
        x, is_vision, text, vision = ctx.saved_tensors
        renormalize = renormalize_fused if x.is_cuda else renormalize_by_formula
        normed, grad_x = renormalize(x, grad * _weight(is_vision, text, vision), ctx.eps)
        rows = (grad.float() * normed).flatten(0, -2)
        if vision is None:
            return grad_x, None, None, rows.sum(0).to(text.dtype), None
        # A product instead of row lists: no row may be of this rank or of this modality.
        kinds = torch.stack([~is_vision, is_vision]).flatten(1).to(rows.dtype)
        return grad_x, None, None, *(kinds @ rows).to(text.dtype)


def _weight(is_vision, text, vision):
    return text if vision is None else torch.where(is_vision, vision, text)


def renormalize_by_formula(x, grad, eps):
    """The normalised x once more, and the gradient to x from the gradient to it."""
    normed, grad = x.float(), grad.float()
    inverse_rms = torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    normed = normed * inverse_rms
    along = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / x.shape[-1]
    grad_x = torch.addcmul(grad, normed, along, value=-1).mul_(inverse_rms)
    return normed.to(x.dtype), grad_x.to(x.dtype)


def renormalize_fused(x, grad, eps):
    """The same by kernels of torch, fused on a GPU and slower than the formula on a CPU."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        normed = rms_normalize(x, eps)
    return normed.detach(), torch.autograd.grad(normed, x, grad)[0]
