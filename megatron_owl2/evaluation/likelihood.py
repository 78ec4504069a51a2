"""Answers by likelihood: of several texts the one that the model finds most likely.

Importing this needs no torch; the generator that is passed in has it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_owl2.data.conversation import prompt_ids
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.evaluation.choices import LETTERS

if TYPE_CHECKING:
    import torch

    from megatron_owl2.inference.engine import Generator


class Found(Protocol):
    """What `Generator.log_likelihoods` gives: the sum of log probabilities, and of how many ids."""

    @property
    def total(self) -> float: ...
    @property
    def tokens(self) -> int: ...


Measure = Callable[[Found, str], float]  # of what was found for a text; the largest is chosen


@dataclass(frozen=True)
class Candidates:
    """The texts that are compared, each with what comes before it.

    `pairs` are (context, text). `in_template` makes a question of the context, with the question's
    images, and an answer of the text, which `ends` if EOS is part of it. Else both are plain text
    behind a BOS, tokenised in one piece, and the context may be empty.
    """

    pairs: tuple[tuple[str, str], ...]
    measure: Measure
    in_template: bool = False
    ends: bool = False


def total(found: Found, text: str) -> float:
    """The likelihood of the whole text."""
    return found.total


def per_position(found: Found, text: str) -> float:
    """The mean over the text and its BOS, which OpenCompass divides by, too."""
    return found.total / (found.tokens + 1)


def per_character(found: Found, text: str) -> float:
    """The mean over characters without the leading space, as lm-eval's acc_norm."""
    return found.total / max(1, len(text.removeprefix(" ")))


def answers(
    generator: "Generator",
    asked: Sequence[tuple[Candidates, Sequence[str]]],
    images: Sequence[Sequence["torch.Tensor"]],
    batch_size: int,
) -> list[str]:
    """For each question the letter of its most likely candidate, the first of equals.

    `asked` are candidates with their prompts in the model's template, none where the candidates are
    plain text; `images` are those of each question. At most `batch_size` texts are
    in a batch. Raises InferenceError as the generator does.
    """
    rows = [
        (number, *_ids(candidates, prompt, pair, generator.tokenizer))
        for number, (candidates, prompts) in enumerate(asked)
        for prompt, pair in zip(
            prompts if candidates.in_template else [""] * len(candidates.pairs),
            candidates.pairs,
            strict=True,
        )
    ]
    found: list[Found] = []
    for first in range(0, len(rows), batch_size):
        numbers, contexts, texts = zip(*rows[first : first + batch_size], strict=True)
        shown = [images[number] if asked[number][0].in_template else [] for number in numbers]
        found += generator.log_likelihoods(contexts, texts, shown)
    each = iter(found)
    letters = []
    for candidates, _ in asked:
        values = [candidates.measure(next(each), text) for _, text in candidates.pairs]
        letters.append(LETTERS[values.index(max(values))])
    return letters


def _ids(
    candidates: Candidates, prompt: str, pair: tuple[str, str], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """The ids of the context and those of the text."""
    context, text = pair
    if candidates.in_template:
        ending = [tokenizer.eos_id] if candidates.ends else []
        return prompt_ids(prompt, tokenizer), tokenizer.encode(text) + ending
    before = tokenizer.encode(context) if context else []
    return [tokenizer.bos_id, *before], tokenizer.encode(context + text)[len(before) :]
