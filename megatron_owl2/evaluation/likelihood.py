"""Answers by likelihood: of several texts the one that the model finds most likely.

Importing this needs no torch; the generator that is passed in has it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_owl2.config.templates import OWL2, Template
from megatron_owl2.data.conversation import prompt_ids
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.evaluation.choices import LETTERS

if TYPE_CHECKING:
    import torch

    from megatron_owl2.inference.engine import Generator
    from megatron_owl2.inference.likelihood import LogLikelihood


Measure = Callable[["LogLikelihood", str], float]  # of a text's likelihood; the largest is chosen


@dataclass(frozen=True)
class Candidates:
    """The texts that are compared, each with what comes before it.

    `pairs` are (context, text). `in_template` makes a question of the context, with the question's
    images, and an answer of the text, which `ends` if EOS is part of it. Else both are plain text
    behind a BOS, tokenised in one piece, and the context may be empty. `official` gives the whole
    prompts of published code before the texts, for a number of placeholders and a suffix.
    """

    pairs: tuple[tuple[str, str], ...]
    measure: Measure
    in_template: bool = False
    ends: bool = False
    official: Callable[[int, str], list[str]] | None = None


def total(found: "LogLikelihood", text: str) -> float:
    """The likelihood of the whole text."""
    return found.total


def per_position(found: "LogLikelihood", text: str) -> float:
    """The mean over the text and its BOS, which OpenCompass divides by, too."""
    return found.total / (found.tokens + 1)


def per_character(found: "LogLikelihood", text: str) -> float:
    """The mean over characters without the leading space, as lm-eval's acc_norm."""
    return found.total / max(1, len(text.removeprefix(" ")))


def answers(
    generator: "Generator",
    asked: Sequence[tuple[Candidates, Sequence[str]]],
    images: Sequence[Sequence["torch.Tensor"]],
    template: Template = OWL2,
) -> list[str]:
    """For each question the letter of its most likely candidate, the first of equals.

    `asked` are candidates with their prompts in the model's `template`, none where the candidates
    are plain text; `images` are those of each question. Raises InferenceError as the generator
    does.
    """
    contexts, texts, shown = [], [], []
    for (candidates, prompts), of_question in zip(asked, images, strict=True):
        prompts = prompts if candidates.in_template else [""] * len(candidates.pairs)
        for prompt, pair in zip(prompts, candidates.pairs, strict=True):
            context, text = _ids(candidates, prompt, pair, generator.tokenizer, template)
            contexts.append(context)
            texts.append(text)
            shown.append(of_question if candidates.in_template else [])
    found = iter(generator.log_likelihoods(contexts, texts, shown))
    letters = []
    for candidates, _ in asked:
        values = [candidates.measure(next(found), text) for _, text in candidates.pairs]
        letters.append(LETTERS[values.index(max(values))])
    return letters


def _ids(
    candidates: Candidates,
    prompt: str,
    pair: tuple[str, str],
    tokenizer: Tokenizer,
    template: Template,
) -> tuple[list[int], list[int]]:
    """The ids of the context and those of the text."""
    context, text = pair
    if candidates.in_template:
        ending = [tokenizer.eos_id] if candidates.ends else []
        return prompt_ids(prompt, tokenizer, template), tokenizer.encode(text) + ending
    before = tokenizer.encode(context) if context else []
    return [tokenizer.bos_id, *before], tokenizer.encode(context + text)[len(before) :]
