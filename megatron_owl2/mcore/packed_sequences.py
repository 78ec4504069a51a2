"""Packed sequences: several samples in one row, none of which attends to another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True)
class PackedSequences:
    """Sequences in the rows of a micro-batch of b rows of s positions.

    `lengths` are those of the sequences of each row, on the host, and add up to s: padding at the
    end of a row is a sequence of its own. `cu_seqlens`, int32 [n + 1], is where each of all n
    begins, and the last ends, in the rows one after the other [b * s].
    """

    lengths: tuple[tuple[int, ...], ...]
    cu_seqlens: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], row_length: int) -> "PackedSequences":
        """From the samples' lengths in each row; what is missing to `row_length` is padding."""
        rows = []
        for row in lengths:
            missing = row_length - sum(row)
            rows.append((*row, missing) if missing else tuple(row))
        ends = accumulate(chain.from_iterable(rows), initial=0)
        return cls(tuple(rows), torch.tensor([*ends], dtype=torch.int32))

    def padded(self, missing: int) -> "PackedSequences":
        """The same in rows that are `missing` positions of padding longer."""
        length = sum(self.lengths[0]) + missing
        return PackedSequences.of(self.lengths, length)

    @property
    def max_length(self) -> int:
        """Positions of the longest sequence."""
        return max(map(max, self.lengths))

    def numbers(self, device: torch.device) -> torch.Tensor:
        """The number of the sequence, in its row, that each position belongs to, int64 [b, s]."""
        rows = []
        for row in self.lengths:
            counts = torch.tensor(row, device=device)
            numbers = torch.arange(len(row), device=device)
            rows.append(numbers.repeat_interleave(counts, output_size=sum(row)))
        return torch.stack(rows)

    def parameters(self) -> PackedSeqParams:
        """The form that megatron-core hands to Transformer Engine (format thd)."""
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            max_seqlen_q=self.max_length,
            max_seqlen_kv=self.max_length,
        )

    def with_offsets(self, cu_seqlens: torch.Tensor) -> "PackedSequences":
        """The same with `cu_seqlens` elsewhere, such as on another device."""
        return replace(self, cu_seqlens=cu_seqlens)
