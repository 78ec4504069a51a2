"""Tensors that are read when they are needed: a model converts with one of them in memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype whose numbers come from `read`, anew at every call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "LazyTensor":
        """One that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach())

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def of_model(model: torch.nn.Module) -> dict[str, LazyTensor]:
    """The parameters of a model by name, as they are when they are read."""
    return {name: LazyTensor.of(parameter) for name, parameter in model.named_parameters()}
