"""Activation checkpointing of layers: which kind, and the gradients it leaves."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_owl2.model import layer_stack
from megatron_owl2.model.layer_stack import ActivationCheckpoint


@dataclass(frozen=True)
class Kinds:
    """An argument of a layer that is no tensor and holds one."""

    is_vision: torch.Tensor


class Layer(nn.Module):
    """A layer with the kinds of arguments that the decoder's have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.vision = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x, kinds, rotary, mask):
        self.calls += 1
        cos, sin = rotary
        y = torch.where(kinds.is_vision, self.vision(x), self.text(x))
        return x + torch.tanh(y * cos + y.flip(-1) * sin)


def inputs(number, asks):
    """Arguments of micro-batch `number`; `asks` is whether the hidden states want a gradient."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(6, 4, generator=generator).requires_grad_(asks)
    kinds = Kinds(torch.rand(6, 1, generator=generator) < 0.5)
    rotary = tuple(torch.randn(6, 4, generator=generator) for _ in range(2))
    return x, kinds, rotary, None


def gradients(layer, call, asks):
    """Two micro-batches in flight, and the gradients to parameters and inputs."""
    batches = [inputs(number, asks) for number in range(2)]
    outputs = [call(layer, *batch) for batch in batches]
    for number, out in enumerate(outputs):
        if out.requires_grad:
            ((number + 1) * out.square()).sum().backward()
    return [p.grad for p in layer.parameters()], [batch[0].grad for batch in batches]


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("trains", [(), ("vision",), ("text", "vision")])
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_every_kind_leaves_the_gradients_of_none(fuses, asks, trains, kind):
    chosen = []

    def checkpoint(function, *inputs, **options):
        chosen.append(options.get("use_reentrant", False))
        return layer_stack.checkpoint(function, *inputs, **options)

    found = []
    context = SimpleNamespace(recompute=kind, fuses_gradients=fuses)
    for call in (lambda layer, *x: layer(*x), ActivationCheckpoint(context, kind, checkpoint)):
        layer = Layer()
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.startswith(trains) if trains else False)
        found.append(gradients(layer, call, asks))
    for ours, expected in zip(*(a + b for a, b in found), strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or torch.equal(ours, expected)
    reached = asks or bool(trains)
    # Weights that take their gradients themselves must be themselves in the backward pass.
    assert chosen == [kind == "full" and fuses and reached] * 2
    assert layer.calls == (4 if reached else 2), "computed again for a backward pass only"


def test_nothing_is_kept_without_a_backward_pass():
    def refused(function, *inputs, **options):
        raise AssertionError("checkpointed without a backward pass")

    context = SimpleNamespace(recompute="full", fuses_gradients=True)
    call, layer = ActivationCheckpoint(context, "full", refused), Layer()
    with torch.no_grad():
        found = call(layer, *inputs(0, False))
    assert torch.equal(found, layer(*inputs(0, False)))
