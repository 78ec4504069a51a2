"""Key/value cache of the decoder, preallocated for a number of sequences and positions.

Sequences take rows 0, 1, ... without gaps, each from position 0 on, so that a decode step reads one
slice of the cache and nothing is copied but the new keys and values.
"""

from dataclasses import dataclass

import torch

from megatron_owl2.config.schema import DecoderConfig
from megatron_owl2.mcore.parallel import ParallelContext


class KeyValueCache:
    """Keys and values [rows, kv_heads / tp, positions, d] of every decoder layer.

    A pass of the decoder writes through the layers that `prefill` or `decode` gives. They start as
    zeros, because a masked position has weight 0, and 0 times what memory holds may be no number.
    """

    def __init__(self, context: ParallelContext, decoder: DecoderConfig, rows: int, positions: int):
        heads = decoder.num_kv_heads // context.tensor_parallel_size
        shape = rows, heads, positions, decoder.hidden_size // decoder.num_heads
        self.rows, self.positions = rows, positions
        self.device = context.device
        options = {"dtype": context.dtype, "device": context.device}
        self._layers = [
            (torch.zeros(shape, **options), torch.zeros(shape, **options))
            for _ in range(decoder.num_layers)
        ]

    def prefill(self, first: int) -> list["PrefillLayer"]:
        """Layers for whole prompts, in the rows from `first` on."""
        return [PrefillLayer(key, value, first) for key, value in self._layers]

    def decode(
        self, positions: torch.Tensor, longest: int, *, together: bool
    ) -> list["DecodeLayer"]:
        """Layers for one new token in each of the first rows, at positions int64 [b] that end at
        `longest`; `together` if all do."""
        rows = torch.arange(len(positions), device=self.device)
        places = None if together else positions
        return [
            DecodeLayer(key[: len(rows)], value[: len(rows)], rows, places, longest)
            for key, value in self._layers
        ]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row to another one."""
        for key, value in self._layers:
            key[target, :, :length] = key[source, :, :length]
            value[target, :, :length] = value[source, :, :length]

    def reorder(self, rows: torch.Tensor, length: int) -> None:
        """Have the first rows continue `rows` int64 [n] (of beams), of `length` positions each."""
        for layer in self._layers:
            for tensor in layer:
                tensor[: len(rows), :, :length] = tensor[rows, :, :length]


@dataclass(frozen=True)
class PrefillLayer:
    """One layer's cache during the pass of new prompts, padded at their ends."""

    key: torch.Tensor
    value: torch.Tensor
    first: int

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep keys and values [s, b, kv_heads, d]; they are all that these prompts attend to."""
        length, rows = key.shape[0], slice(self.first, self.first + key.shape[1])
        self.key[rows, :, :length] = key.permute(1, 2, 0, 3)
        self.value[rows, :, :length] = value.permute(1, 2, 0, 3)
        return key, value


@dataclass(frozen=True)
class DecodeLayer:
    """One layer's cache during the pass of one new token for each of its rows.

    `positions` int64 [b] are the places of the tokens, None if all are the last of `longest`.
    """

    key: torch.Tensor
    value: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor | None
    longest: int

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new [b, kv_heads, d]; returns all so far [b, kv_heads, longest, d], of which a
        shorter sequence's last ones mean nothing."""
        for cached, new in ((self.key, key), (self.value, value)):
            if self.positions is None:
                cached[:, :, self.longest - 1] = new
            else:
                cached[self.rows, :, self.positions] = new
        return self.key[:, :, : self.longest], self.value[:, :, : self.longest]
