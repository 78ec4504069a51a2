"""Building of modules without initial values, where a checkpoint gives them theirs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from megatron_owl2.mcore.parallel import ParallelContext


class SkipInitialization(TorchFunctionMode):
    """Function mode in which torch.nn.init does nothing and torch.randn draws nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            func = torch.empty
        return func(*args, **kwargs)


@contextmanager
def without_initial_values(context: ParallelContext) -> Iterator[None]:
    """Context in which the weights of new modules lie on the device of `context` at once and are
    what its memory happens to hold; whoever builds them reads every one.

    Drawing 8 billion numbers, which a checkpoint overwrites, takes minutes, and those of all ranks
    of a node may not fit into its memory.
    """
    settings = (context.transformer, context.replicated)
    for given in settings:
        given.perform_initialization = False
    try:
        with context.device or torch.device("cpu"), SkipInitialization():
            yield
    finally:
        for given in settings:
            given.perform_initialization = True
