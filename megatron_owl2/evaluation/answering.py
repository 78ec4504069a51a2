"""Answers to a batch of questions: generated, turn by turn in conversations, or by likelihood."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_owl2.data.conversation import asking_ids
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
from megatron_owl2.evaluation import likelihood
from megatron_owl2.evaluation.question import Question
from megatron_owl2.evaluation.rows import Id

if TYPE_CHECKING:
    import torch

    from megatron_owl2.inference.engine import Generator

_logger = logging.getLogger(__name__)


def answers(
    generator: "Generator",
    asked: Sequence[Question],
    prompts: Sequence[Sequence[str]],
    images: Sequence[Sequence["torch.Tensor"]],
    suffix: str,
    limits: Mapping[str, int],
) -> list[str]:
    """The model's answers to questions, of which `prompts` has each one's or those before its
    candidates.

    A question that follows others comes after these and the model's own answers to them, in the
    model's template; so all conversations of a batch go on together, a turn at a time. `images` are
    those of each question, `limits` the numbers of new tokens. Raises InferenceError as the
    generator does.
    """
    compared = [
        (q.candidates, of_q) for q, of_q in zip(asked, prompts, strict=True) if q.candidates
    ]
    if compared:
        return likelihood.answers(generator, compared, images, generator.config.conversation)
    said: dict[Id, str] = {}
    conversations = _conversations(asked)
    for turn in range(1, 1 + max(map(len, conversations), default=0)):
        places = [place for place, turns in enumerate(conversations) if len(turns) == turn]
        texts = generator.generate(
            [
                prompts[place][0]
                if turn == 1
                else _ids(generator, conversations[place], said, suffix, limits["max_new_tokens"])
                for place in places
            ],
            [images[place] for place in places],
            **limits,
        )
        said |= {asked[place].id: text for place, text in zip(places, texts, strict=True)}
    return [said[question.id] for question in asked]


def _conversations(asked: Sequence[Question]) -> list[list[Question]]:
    """For each question those that it follows, from the first on, and itself."""
    found: dict[Id, list[Question]] = {}
    for question in asked:
        before = [] if question.follows is None else found[question.follows]
        found[question.id] = [*before, question]
    return [found[question.id] for question in asked]


def _ids(
    generator: "Generator",
    turns: Sequence[Question],
    said: Mapping[Id, str],
    suffix: str,
    max_new_tokens: int,
) -> list[int]:
    """The ids that ask the last of the questions after the others and their answers.

    The oldest ones are left out where an answer has no room behind them; the images stand at the
    beginning of what remains.
    """
    config = generator.config
    room = config.decoder.max_positions + 1 - max_new_tokens  # the last new token is never read
    ids: list[int] = []
    for left_out in range(len(turns)):
        first, *later = turns[left_out:]
        pieces = [
            (question.with_placeholders() + suffix).split(IMAGE_PLACEHOLDER)
            for question in (first, *(replace(question, images=()) for question in later))
        ]
        answered = [said[question.id] for question in turns[left_out:-1]]
        ids = asking_ids(pieces, answered, generator.tokenizer, config.conversation)
        if len(ids) + ids.count(IMAGE_TOKEN_ID) * (config.tokens_per_image - 1) <= room:
            if left_out:
                _logger.warning(
                    "question %r is asked without the first %d of the %d before it, for which the "
                    "decoder's %d positions have no room",
                    turns[-1].id,
                    left_out,
                    len(turns) - 1,
                    config.decoder.max_positions,
                )
            break
    return ids
