"""Layer stacks with activation checkpointing.

Layers carry their numbers in the whole model on every pipeline stage.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from megatron_owl2.mcore.parallel import ParallelContext


def checkpoint(function: Callable, *inputs: Any, use_reentrant: bool = False) -> Any:
    """function(*inputs), computed again in the backward pass; no random state is kept, for nothing
    draws random numbers."""
    return torch_checkpoint.checkpoint(
        function, *inputs, use_reentrant=use_reentrant, preserve_rng_state=False
    )


class ActivationCheckpoint:
    """Activation checkpointing of function calls: only inputs are kept for the backward pass.

    `kind` is the `parallel.recompute` that asks for it: "full" for whole layers, "selective" for
    what is large and cheap (attention and gates). The inputs of each micro-batch are captured by
    the call, so any number may be in flight. `checkpoint` is the kernels' way to do it.

    Layers whose GEMMs add weight gradients to the optimizer's buffers are checkpointed reentrantly:
    without, saved-tensor hooks hand a GEMM its weight as a plain tensor, which has lost the marks
    that tell the buffers of it. Reentrant checkpointing sees gradients of tensors among the
    arguments only, and needs one that asks for a gradient.
    """

    def __init__(self, context: ParallelContext, kind: str, checkpoint: Callable = checkpoint):
        self.active = context.recompute == kind
        # What "selective" computes again has no weights.
        self._keeps_weights = kind == "full" and context.fuses_gradients
        self._checkpoint = checkpoint

    def __call__(self, function: Any, *inputs: Any) -> Any:
        """function(*inputs), checkpointed where a backward pass will follow; whole layers are
        modules."""
        if not (self.active and torch.is_grad_enabled()):
            return function(*inputs)
        if not self._keeps_weights:
            return self._checkpoint(function, *inputs)
        if not any(map(_asks, inputs)) and any(map(_asks, function.parameters())):
            # The first layer above frozen parameters: a gradient that nobody reads brings the
            # backward pass here.
            inputs = (inputs[0].detach().requires_grad_(), *inputs[1:])
        return self._checkpoint(function, *inputs, use_reentrant=any(map(_asks, inputs)))


def _asks(value: Any) -> bool:
    """Whether an argument or parameter is a tensor that asks for a gradient."""
    return isinstance(value, torch.Tensor) and value.requires_grad


class LayerStack(nn.Module):
    """Layers `first` to `last - 1` of a model, named by these numbers on every pipeline stage."""

    def __init__(
        self,
        context: ParallelContext,
        build: Callable[[int], nn.Module],
        first: int,
        last: int,
        checkpoint: Callable = checkpoint,
    ):
        super().__init__()
        self.activation_checkpoint = ActivationCheckpoint(context, "full", checkpoint)
        for number in range(first, last):
            self.add_module(str(number), build(number))

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def numbers(self) -> list[int]:
        """The numbers, in the whole model, of the layers here."""
        return [int(name) for name in self._modules]

    def forward(self, layer: nn.Module, *inputs: Any) -> Any:
        """layer(*inputs) of one of the layers, checkpointed under `parallel.recompute=full`."""
        return self.activation_checkpoint(layer, *inputs)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name: all that a checkpoint holds of a model."""
    buffers = {
        f"{owner}.{name}" if owner else name: buffer
        for owner, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }  # state_dict would ask Transformer Engine for the state of its scales, too
    return dict(model.named_parameters()) | buffers
