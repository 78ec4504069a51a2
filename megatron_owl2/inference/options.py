"""Generation options of a request: lengths, sampling, stop strings and beams."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_owl2.errors import InferenceError

_LARGEST = sys.float_info.max  # a whole number may be larger


@dataclass(frozen=True)
class GenerationOptions:
    """Generation options, greedy unless `temperature` or `beams` says otherwise.

    `max_new_tokens` is the length limit and `min_new_tokens` the number of tokens before which no
    end token comes. `temperature` 0 takes the likeliest token; above 0 tokens are drawn from the
    `top_k` likeliest (0: all) and then from the fewest whose probabilities sum to `top_p`, by a
    generator of the request's own, started from `seed`. `repetition_penalty` divides the positive
    logits of tokens seen before and multiplies the negative ones (Keskar et al., 2019). Text ends
    before the first of the `stop` strings. `beams` above 1 searches with so many hypotheses, whose
    score is log p / length^length_penalty. `logprobs` asks for the log probabilities of the chosen
    tokens, before any of these options. Raises InferenceError for a value out of range.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    logprobs: bool = False

    def __post_init__(self):
        _in_range("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        _in_range("min_new_tokens", self.min_new_tokens, self.min_new_tokens >= 0, "at least 0")
        _in_range(
            "temperature",
            self.temperature,
            0 <= self.temperature <= _LARGEST,
            "at least 0, and finite",
        )
        _in_range("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _in_range("top_k", self.top_k, self.top_k >= 0, "at least 0 (0: all)")
        _in_range(
            "repetition_penalty",
            self.repetition_penalty,
            0 < self.repetition_penalty <= _LARGEST,
            "above 0, and finite",
        )
        _in_range("beams", self.beams, 1 <= self.beams <= sys.maxsize, f"1 to {sys.maxsize}")
        _in_range(
            "length_penalty", self.length_penalty, -10 <= self.length_penalty <= 10, "-10 to 10"
        )
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise InferenceError(f"stop is {self.stop!r}; it must be a list of texts, none empty")
        if self.beams > 1 and (self.temperature or self.logprobs):
            raise InferenceError(
                "beams above 1 search without sampling and give no logprobs; leave out temperature "
                "and logprobs"
            )


def _in_range(name: str, value: float, good: bool, wanted: str) -> None:
    if not good:
        raise InferenceError(f"{name} is {value}; it must be {wanted}")
