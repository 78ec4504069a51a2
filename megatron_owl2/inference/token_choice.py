"""Choice of the next token: the likeliest, or drawn with temperature, top-k and top-p."""

import random
from collections.abc import Sequence

import torch

from megatron_owl2.inference.options import GenerationOptions

COLDEST = 1e-5  # temperatures below are greedy decoding, from which they differ by rounding only


class TokenChooser:
    """Choices of one request, in order; its random numbers are its own.

    `seen` are the ids of its prompt, which a repetition penalty counts, too.
    """

    def __init__(self, options: GenerationOptions, seen: Sequence[int]):
        self.options = options
        self._cold = options.temperature < COLDEST
        self.greedy = self._cold and options.repetition_penalty == 1
        self._random = random.Random(options.seed)
        self._seen = dict.fromkeys(seen) if options.repetition_penalty != 1 else None

    def choose(self, logits: torch.Tensor) -> int:
        """The next id by logits fp32 [vocab] of a device."""
        options = self.options
        if self._seen is not None:
            logits = penalized(logits, [*self._seen], options.repetition_penalty)
        if self._cold:
            token = int(logits.argmax())
        else:
            values, ids = candidates(logits, options)
            token = int(ids[draw(values, self._random.random())])
        if self._seen is not None:
            self._seen[token] = None
        return token


def penalized(logits: torch.Tensor, seen: list[int], penalty: float) -> torch.Tensor:
    """Logits [vocab] with those of the ids `seen` divided by the penalty where positive and
    multiplied where negative (Keskar et al., 2019)."""
    logits = logits.clone()
    chosen = logits[seen]
    logits[seen] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
    return logits


def candidates(
    logits: torch.Tensor, options: GenerationOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, falling, and ids of the tokens that top-k and then top-p leave.

    The probabilities are those among the top k; the fewest that sum to top_p stay.
    """
    count = min(options.top_k or len(logits), len(logits))
    # Sorted, as equal logits are then ordered by id on every device.
    values, ids = (logits / options.temperature).sort(descending=True, stable=True)
    probabilities = values[:count].softmax(0)
    before = probabilities.cumsum(0) - probabilities
    kept = max(1, int((before < options.top_p).sum()))
    return probabilities[:kept], ids[:kept]


def draw(probabilities: torch.Tensor, uniform: float) -> int:
    """Index drawn by a uniform number in [0, 1) from probabilities, which need not sum to 1."""
    sums = probabilities.double().cumsum(0)
    return min(int((sums <= uniform * sums[-1]).sum()), len(sums) - 1)
