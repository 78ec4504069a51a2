"""Lazy tensors, read when they are needed: a model converts with three of them in memory."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from megatron_owl2.errors import ConversionError
from megatron_owl2.model.layer_stack import weights


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype whose numbers come from `read`, anew at every call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "LazyTensor":
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach())

    @property
    def nbytes(self) -> int:
        """Size of the numbers in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def of_model(model: torch.nn.Module) -> dict[str, LazyTensor]:
    """The weights of a model by name, as they are when they are read."""
    return {name: LazyTensor.of(tensor) for name, tensor in weights(model).items()}


def finite(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`; raises ConversionError if a value is not finite there."""
    cast = tensor.to(dtype)
    if not all(limit.isfinite() for limit in cast.aminmax()):
        before = all(limit.isfinite() for limit in tensor.aminmax())
        reason = f"is too large for {dtype}" if before else "is not finite"
        raise ConversionError(f"{name} holds a value that {reason}; nothing was written")
    return cast


def read_ahead(tensors: dict[str, LazyTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in order; the next one is read while the caller is busy with the last.

    Three are in memory at most: the caller's, until it asks for more, the one it is given then, and
    the one that is read behind it.
    """
    with ThreadPoolExecutor(1) as reader:
        coming = None
        for name, tensor in tensors.items():
            ready, coming = coming, (name, reader.submit(tensor.read))
            if ready is not None:
                yield ready[0], ready[1].result()
        if coming is not None:
            yield coming[0], coming[1].result()
