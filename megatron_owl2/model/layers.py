"""A stack of layers under their numbers in the whole model, run one by one."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class LayerStack(nn.Module):
    """Layers `first` to `last - 1` of a model, named by these numbers on every pipeline stage.

    With `recompute`, a layer keeps only its inputs for the backward pass. The inputs of each
    micro-batch are captured by the call, so any number may be in flight; no layer draws random
    numbers, so no random state is kept.
    """

    def __init__(self, build: Callable[[], nn.Module], first: int, last: int, *, recompute: bool):
        super().__init__()
        self.recompute = recompute
        for number in range(first, last):
            self.add_module(str(number), build())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())

    def numbers(self) -> list[int]:
        """The global numbers of the layers here."""
        return [int(name) for name in self._modules]

    def run(self, layer: nn.Module, *inputs):
        """layer(*inputs), with recomputation where a backward pass will follow."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)
