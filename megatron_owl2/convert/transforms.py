"""Transforms of weights: `join` makes ours of a directory's tensors, `split` undoes it exactly."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Copy:
    """One tensor, as it is."""

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]


@dataclass(frozen=True)
class Interleave:
    """Several tensors cut into `groups` blocks of rows: block 0 of each, block 1 of each, ...

    `shares` are the relative sizes of the tensors. With one group it is a concatenation.
    """

    groups: int
    shares: tuple[int, ...]

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        blocks = [tensor.unflatten(0, (self.groups, -1)) for tensor in tensors]
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        blocks = tensor.unflatten(0, (self.groups, -1))
        unit = blocks.shape[1] // sum(self.shares)
        return [b.flatten(0, 1) for b in blocks.split([unit * s for s in self.shares], dim=1)]


@dataclass(frozen=True)
class LeadingOnes:
    """One tensor, to which we add `count` leading dimensions of size 1."""

    count: int

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0].reshape((1,) * self.count + tensors[0].shape)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.reshape(tensor.shape[self.count :])]


@dataclass(frozen=True)
class TrailingOnes:
    """One tensor, of which the other side has `count` trailing dimensions of size 1."""

    count: int

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0].reshape(tensors[0].shape[: -self.count])

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.reshape(tensor.shape + (1,) * self.count)]


@dataclass(frozen=True)
class Repeat:
    """One tensor, of which the other side has `count` equal copies."""

    count: int

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor] * self.count


@dataclass(frozen=True)
class PadRows:
    """One tensor, behind which we have `count` rows of zeros."""

    count: int

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        return torch.cat([tensor, tensor.new_zeros(self.count, *tensor.shape[1:])])

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[: len(tensor) - self.count]]


Transform = Copy | Interleave | LeadingOnes | TrailingOnes | Repeat | PadRows
