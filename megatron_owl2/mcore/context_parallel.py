"""Positions of a sequence on each context-parallel rank, for the data and for the model."""

import torch


def positions(
    length: int, rank: int, size: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """The positions, int64 [length / size], of a sequence that context-parallel rank `rank` has.

    Of 2 * size equal pieces it has number `rank` and the one as far from the end, so that causal
    attention costs every rank the same; the division of megatron-core and Transformer Engine.
    """
    pieces = torch.arange(length, device=device).view(2 * size, -1)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])
