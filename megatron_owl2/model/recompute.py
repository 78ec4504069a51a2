"""Activation recomputation, one layer at a time."""

import torch
from torch.utils.checkpoint import checkpoint


def run_layer(layer: torch.nn.Module, *inputs, recompute: bool):
    """layer(*inputs), keeping only the inputs for the backward pass if `recompute`.

    The inputs of each micro-batch are captured by the call, so any number may be in flight. No
    layer draws random numbers, so no random state is kept.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return layer(*inputs)
