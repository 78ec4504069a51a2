"""Low-rank adapters of the decoder's linears (LoRA, Hu et al., 2021; names and scale as in peft).

y = W x + alpha / r B A dropout(x), with A [r, in] and B [out, r]. The product with A runs before
tensor-parallel ranks exchange anything, so that they exchange r numbers of a token:

    column linear: A is on every rank, B split by rows; A x is brought to all ranks as x is.
    row linear: A is split by columns, B on every rank; A x is summed over the ranks as y is.

Adapters are GEMMs of torch, whatever kernels compute the linear beside them.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from megatron_owl2.config import lora
from megatron_owl2.mcore.parallel import ParallelContext, mark_tensor_parallel
from megatron_owl2.model.dropout import keep_mask, text_key
from megatron_owl2.model.layer_stack import checkpoint


class Adapter(nn.Module):
    """One adapter: A starts uniform within 1 / sqrt(in), B zero, so that it adds nothing.

    The numbers of A depend on `train.seed` and the target's name alone. `split` says which side of
    the linear is split over the tensor-parallel ranks.
    """

    def __init__(
        self,
        context: ParallelContext,
        target: str,
        inputs: int,
        outputs: int,
        split: Literal["inputs", "outputs"],
    ):
        super().__init__()
        rank, ranks = context.lora.rank, context.tensor_parallel_size
        if split == "inputs":
            inputs //= ranks
        else:
            outputs //= ranks
        # The first input channel of this rank.
        self.begin = context.groups.tp.rank() * inputs if split == "inputs" else 0
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, dtype=context.dtype))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, dtype=context.dtype))
        if split == "inputs":
            mark_tensor_parallel(self.lora_A, dim=1)
            context.mark_sequence_parallel(self.lora_B)
        else:
            mark_tensor_parallel(self.lora_B, dim=0)
            context.mark_sequence_parallel(self.lora_A)
        if not self.lora_A.is_meta:
            key = text_key(f"{context.seed} {target}")
            self._draw(key, inputs * ranks if split == "inputs" else inputs)

    @torch.no_grad()
    def _draw(self, key: int, inputs: int) -> None:
        """Draw A as a whole, and keep this rank's columns; those of peft's kaiming_uniform_."""
        generator = torch.Generator().manual_seed(key)
        shape = len(self.lora_A), inputs
        whole = (2 * torch.rand(shape, generator=generator, device="cpu") - 1) / inputs**0.5
        self.lora_A.copy_(whole[:, self.begin :][:, : self.lora_A.shape[1]])

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B. Reading them by a call has megatron-core wait for what other data-parallel ranks
        have updated of them."""
        return self.lora_A, self.lora_B


class Adapters(nn.ModuleDict):
    """Adapters of a module's linears, by the last part of their target's name.

    `linears`: inputs, outputs and split of every linear that may have one; those that
    `stage.lora.targets` do not select are not here. `prefix` is the rest of the targets' names.
    """

    def __init__(
        self,
        context: ParallelContext,
        prefix: str,
        linears: dict[str, tuple[int, int, Literal["inputs", "outputs"]]],
    ):
        names = {piece: f"{prefix}.{piece}" for piece in linears}
        super().__init__(
            {
                piece: Adapter(context, names[piece], *sizes)
                for piece, sizes in linears.items()
                if lora.selects(context.lora, names[piece])
            }
        )
        self.context, self.prefix = context, prefix

    def column_inputs(
        self, x: torch.Tensor, token_keys: torch.Tensor | None, *pieces: str
    ) -> dict[str, torch.Tensor]:
        """What the adapters of column linears make of their common input x, before the ranks
        exchange it: [s, b, r] on every tensor-parallel rank, by piece."""
        found = [piece for piece in pieces if piece in self]
        if not found:
            return {}
        if token_keys is not None:
            token_keys = self.context.sequence_slice(token_keys)
        hidden = self._down(x, token_keys, found, "input")
        hidden = self.context.copy_to_tensor_parallel(hidden)
        return dict(zip(found, hidden.chunk(len(found), dim=-1), strict=True))

    def add_columns(
        self, y: torch.Tensor, hidden: dict[str, torch.Tensor], sizes: dict[str, int]
    ) -> torch.Tensor:
        """y [..., n, d] of a column linear plus what the adapters add to its pieces, which take
        `sizes` of the n, one behind the other."""
        if not hidden.keys() & sizes.keys():
            return y
        pieces = zip(sizes, y.split([*sizes.values()], dim=-2), strict=True)
        return torch.cat(
            [
                part + self._up(hidden[piece], piece).view_as(part) if piece in hidden else part
                for piece, part in pieces
            ],
            dim=-2,
        )

    def add_row(
        self, y: torch.Tensor, piece: str, x: torch.Tensor, token_keys: torch.Tensor | None
    ) -> torch.Tensor:
        """y [s/tp, b, out] of a row linear plus what its adapter makes of the input x [s, b,
        in/tp] of the linear."""
        if piece not in self:
            return y
        hidden = self.context.sum_row_outputs(self._down(x, token_keys, [piece], piece))
        return y + self._up(hidden, piece)

    def _down(
        self, x: torch.Tensor, token_keys: torch.Tensor | None, pieces: list[str], source: str
    ) -> torch.Tensor:
        """x [..., in] to alpha / r A dropout(x) of some adapters, [..., r * pieces], with this
        rank's inputs; `source` is what x is called, for the mask.

        token_keys int32 [..., 1] are those of x's rows (`token_keys`); None: no dropout. The mask
        is made again in the backward pass, so that x is all that is kept. Adapters that read one
        input drop the same of it, unlike peft's: to make a mask costs more than to multiply by A.
        """
        settings = self.context.lora
        weights = torch.cat([self[piece]()[0] for piece in pieces])
        scale = settings.alpha / settings.rank
        if token_keys is None:
            return scale * F.linear(x, weights)
        key = text_key(f"{self.context.seed} {self.prefix}.{source}")
        first = self[pieces[0]]
        assert isinstance(first, Adapter)
        begin = first.begin

        def dropped(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            channels = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device) + begin
            kept = keep_mask(token_keys, channels, key, settings.dropout)
            return F.linear(x * kept, weights)

        return scale / (1 - settings.dropout) * checkpoint(dropped, x, weights)

    def _up(self, hidden: torch.Tensor, piece: str) -> torch.Tensor:
        """B hidden: [..., r] to [..., out]."""
        return F.linear(hidden, self[piece]()[1])
