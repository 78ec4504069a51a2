"""A stack of layers under their numbers in the whole model, and what is computed twice."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_owl2.mcore import Layout


def _checkpoint(function, *inputs):
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Again:
    """Calls functions that keep only their inputs and are computed again in the backward pass.

    The inputs of each micro-batch are captured by the call, so any number may be in flight; nothing
    draws random numbers, so no random state is kept. `kind` is the `parallel.recompute` that asks
    for it: "full" for whole layers, "selective" for what is large and cheap: attention and gates.
    """

    def __init__(self, layout: Layout, kind: str, checkpoint: Callable = _checkpoint):
        self.active = layout.recompute == kind
        self._checkpoint = checkpoint

    def __call__(self, function: Callable, *inputs):
        """function(*inputs), with recomputation where a backward pass will follow."""
        if self.active and torch.is_grad_enabled():
            return self._checkpoint(function, *inputs)
        return function(*inputs)


class LayerStack(nn.Module):
    """Layers `first` to `last - 1` of a model, named by these numbers on every pipeline stage."""

    def __init__(
        self,
        layout: Layout,
        build: Callable[[int], nn.Module],
        first: int,
        last: int,
        checkpoint: Callable = _checkpoint,
    ):
        super().__init__()
        self.again = Again(layout, "full", checkpoint)
        for number in range(first, last):
            self.add_module(str(number), build(number))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())

    def numbers(self) -> list[int]:
        """The global numbers of the layers here."""
        return [int(name) for name in self._modules]

    def run(self, layer: Callable, *inputs):
        """layer(*inputs), with full recomputation if the layout says so."""
        return self.again(layer, *inputs)


def gate(gates: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """silu(gates) * values, the SwiGLU of decoder and abstractor."""
    return F.silu(gates) * values


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name: what a checkpoint holds of a model."""
    buffers = {
        f"{owner}.{name}" if owner else name: buffer
        for owner, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }  # state_dict would ask Transformer Engine for the state of its scales, too
    return dict(model.named_parameters()) | buffers
