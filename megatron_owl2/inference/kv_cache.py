"""Key/value cache of the decoder, preallocated for a number of sequences and positions.

Sequences take rows 0, 1, ... without gaps, each from position 0 on, so that a decode step reads one
slice of the cache and nothing is copied but the new keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_owl2.config.schema import DecoderConfig
from megatron_owl2.errors import InferenceError
from megatron_owl2.mcore.parallel import ParallelContext


def position_bytes(context: ParallelContext, decoder: DecoderConfig) -> int:
    """Bytes that one position of one sequence takes in all layers, on this rank."""
    heads = decoder.num_kv_heads // context.tensor_parallel_size
    size = decoder.hidden_size // decoder.num_heads
    return 2 * decoder.num_layers * heads * size * context.dtype.itemsize


class KeyValueCache:
    """Keys and values [rows, kv_heads / tp, 2, positions, d] of every decoder layer.

    A pass of the decoder writes through the layers that `prefill` or `decode` gives. They start as
    zeros, because a masked position has weight 0, and 0 times what memory holds may be no number.
    Raises InferenceError if there is not as much memory.
    """

    def __init__(self, context: ParallelContext, decoder: DecoderConfig, rows: int, positions: int):
        heads = decoder.num_kv_heads // context.tensor_parallel_size
        shape = rows, heads, 2, positions, decoder.hidden_size // decoder.num_heads
        self.rows, self.positions = rows, positions
        try:
            self._layers = [
                torch.zeros(shape, dtype=context.dtype, device=context.device)
                for _ in range(decoder.num_layers)
            ]
        except RuntimeError as error:
            needed = rows * positions * position_bytes(context, decoder) / 2**30
            raise InferenceError(
                f"the key/value cache of {rows:,} sequences of {positions:,} positions takes "
                f"{needed:,.1f} GiB, more than can be had; ask for fewer or shorter ones ({error})"
            ) from None

    def prefill(self, first: int, lengths: Sequence[int]) -> list["PrefillLayer"]:
        """Layers for whole prompts of so many positions, in the rows from `first` on."""
        return [PrefillLayer(layer[first:], lengths) for layer in self._layers]

    def decode(
        self, positions: torch.Tensor, longest: int, *, together: bool
    ) -> list["DecodeLayer"]:
        """Layers for one new token in each of the first rows, at positions int64 [b] that end at
        `longest`; `together` if all do."""
        count, places = len(positions), None
        if not together:  # rows of the layer seen as [rows * kv_heads * 2 * positions, d]
            heads = 2 * self._layers[0].shape[1]
            first = torch.arange(count * heads, device=positions.device) * self.positions
            places = first + positions.repeat_interleave(heads)
        return [DecodeLayer(layer[:count], places, longest) for layer in self._layers]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row to another one."""
        for layer in self._layers:
            layer[target, :, :, :length] = layer[source, :, :, :length]

    def reorder(self, rows: torch.Tensor, length: int) -> None:
        """Have the first rows continue `rows` int64 [n] (of beams), of `length` positions each."""
        for layer in self._layers:
            layer[: len(rows), :, :, :length] = layer[rows, :, :, :length]


@dataclass(frozen=True)
class PrefillLayer:
    """One layer's cache during the pass of new prompts, packed in one row, for its first rows."""

    cached: torch.Tensor
    lengths: Sequence[int]

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep keys and values [s, 1, kv_heads, d]; they are all that these prompts attend to."""
        for number, new in enumerate((key, value)):
            prompts = new[:, 0].split([*self.lengths])
            for row, prompt in zip(self.cached, prompts, strict=False):  # the other rows are free
                row[:, number, : len(prompt)] = prompt.transpose(0, 1)
        return key, value


@dataclass(frozen=True)
class DecodeLayer:
    """One layer's cache during the pass of one new token for each of its rows.

    `places` are where the tokens' keys and values go, int64 [b * kv_heads * 2] in rows of d
    numbers; None if all are the last of `longest`.
    """

    cached: torch.Tensor
    places: torch.Tensor | None
    longest: int

    def extend(self, key_value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new key and value [b, kv_heads, 2, d]; returns all keys and values so far [b,
        kv_heads, longest, d], of which a shorter sequence's last ones mean nothing."""
        if self.places is None:
            self.cached[:, :, :, self.longest - 1] = key_value
        else:
            size = key_value.shape[-1]
            self.cached.view(-1, size).index_copy_(0, self.places, key_value.reshape(-1, size))
        key, value = self.cached[:, :, :, : self.longest].unbind(2)
        return key, value
