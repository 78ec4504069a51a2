"""Calls of every elementwise operation, for parity of the fused with the plain ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_owl2.config.schema import ParallelConfig
from megatron_owl2.mcore import setup
from megatron_owl2.model.kernels.elementwise import Elementwise


def alone() -> ProcessGroup:
    """The tensor-parallel group of a run on one rank."""
    return setup.initialize(ParallelConfig()).tp


@dataclass(frozen=True)
class Case:
    """An operation as a function of an implementation and the inputs that have gradients."""

    name: str
    call: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: tuple[torch.Tensor, ...]

    def outputs_and_gradients(self, operations: Elementwise, dtype: torch.dtype | None = None):
        """In the inputs' dtype or in another; the gradients are of a weighted sum of outputs."""
        inputs = [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in self.inputs]
        found = self.call(operations, *inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        loss = sum((out.float() * _weighting(out)).sum() for out in outputs)
        return [*outputs, *torch.autograd.grad(loss, inputs)]


def _weighting(x: torch.Tensor) -> torch.Tensor:
    """Numbers that are the same in bf16 and in fp32."""
    return torch.linspace(-1, 2, x.numel(), device=x.device).bfloat16().float().view_as(x)


def rotary(s: int, b: int, size: int, dtype: torch.dtype, device: str):
    """Tables of arbitrary angles [s, b, 1, size] with equal halves."""
    angles = torch.rand(s, b, 1, size // 2, device=device) * 6
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def cases(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    s: int = 3,
    b: int = 2,
    hidden: int = 24,
    groups: int = 2,
    sharing: int = 3,
    size: int = 10,
    ffn: int = 1100,
    vocab: int = 5000,
) -> Iterator[Case]:
    """Every operation on s x b tokens of random numbers, half of them vision."""
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    is_vision = torch.arange(s * b, device=device).view(s, b, 1) % 2 == 1
    rows = is_vision.flatten().nonzero().flatten()
    tables = rotary(s, b, size, dtype, device)
    labels = torch.randint(vocab, (s, b), device=device)
    weights = random(hidden), random(hidden)
    x = random(s, b, hidden)
    qkv = random(s * b, groups, sharing + 2, size)

    yield Case(
        "norm by modality",
        lambda e, x, *weights: e.modality_norm(x, is_vision, 1e-6, *weights),
        (x, *weights),
    )
    yield Case(
        "norm of a decoder without split",
        lambda e, x, text: e.modality_norm(x, is_vision, 1e-6, text, None),
        (x, weights[0]),
    )
    yield Case("norm", lambda e, x, weight: e.rms_norm(x, 1e-6, weight), (x, weights[0]))
    yield Case(
        "qkv by modality",
        lambda e, qkv, kv: e.split_qkv(qkv, kv, rows, tables),
        (qkv, random(len(rows), groups, 2, size)),
    )
    yield Case("qkv", lambda e, qkv: e.split_qkv(qkv, None, rows, tables), (qkv,))
    yield Case("swiglu", lambda e, x: e.swiglu(x), (random(s, b, 2 * ffn),))
    yield Case("quick-GELU", lambda e, x, y: e.quick_gelu(x, y), (random(s, b, ffn), random(ffn)))
    yield Case(
        "cross entropy",
        # A copy, because it may put the gradient into the logits.
        lambda e, x: e.cross_entropy(x * 1, labels, alone()),
        (random(s, b, vocab),),
    )
