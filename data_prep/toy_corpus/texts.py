"""Texts of the embedded corpus without an image: dialogues for the language model.

One context in eight is kept for evaluation and occurs in no training text. Colour mixing is the
exception: it is knowledge, which can only be asked for as it was taught.
"""

import dataclasses
import random
import zlib
from collections.abc import Callable

from data_prep.toy_corpus.language import (
    Question,
    candidate_questions,
    caption,
    dialogue,
    retelling,
)
from data_prep.toy_corpus.world import Scene, sample_crowd, sample_scene

SCENE = "scene"
RETELLING = "retelling"  # has many right answers, so it is not evaluated
EVALUATED_SKILLS = (SCENE, "reversal", "mixing", "prices")
_THINGS = ("book", "cup", "door", "fish", "hat", "pen", "sun", "tree")
_MIXTURES = (
    ("red", "yellow", "orange"),
    ("blue", "yellow", "green"),
    ("red", "blue", "purple"),
    ("blue", "green", "cyan"),
    ("red", "white", "pink"),
    ("black", "white", "gray"),
)


def text_dialogue(skill: str, rng: random.Random) -> list[Question]:
    """Dialogue without an image for RETELLING or one of EVALUATED_SKILLS, whose first question
    carries the context."""
    if skill == RETELLING:
        return _retellings(rng)
    if skill == SCENE:
        sample = sample_crowd if rng.random() < 0.5 else sample_scene
        scene = _draw(sample, rng, evaluation=False)
        context, turns = caption(scene), dialogue(scene, rng)
    else:
        context, turns = _draw_task(skill, rng, evaluation=False)
    return [_with_context(context, turns[0]), *turns[1:]]


def _retellings(rng: random.Random) -> list[Question]:
    """Dialogue in which a crowded scene is told again in free order, twice.

    What is said there can only be looked up. A model of this size that learns from questions alone
    hardly comes to look things up: of two things it mixes the colours, in texts and in images.
    """
    scene = _draw(sample_crowd, rng, evaluation=False)
    asked = (f"{caption(scene)} tell it again .", "and again .")
    return [Question(RETELLING, text, retelling(scene, rng)) for text in asked]


def evaluation_questions(skill: str, rng: random.Random) -> list[Question]:
    """Questions for one of EVALUATED_SKILLS about one context that is kept for evaluation, each
    with that context: about a crowded scene one of every skill, of another text skill one."""
    if skill == SCENE:
        scene = _draw(sample_crowd, rng, evaluation=True)
        context = caption(scene)
        asked = [rng.choice(found) for found in candidate_questions(scene, rng).values()]
    else:
        context, turns = _draw_task(skill, rng, evaluation=True)
        asked = [dataclasses.replace(turns[0], skill=skill)]
    return [_with_context(context, question) for question in asked]


def _draw(sample: Callable[[random.Random], Scene], rng: random.Random, evaluation: bool) -> Scene:
    while True:
        scene = sample(rng)
        if _is_reserved(caption(scene)) == evaluation:
            return scene


def _draw_task(skill: str, rng: random.Random, evaluation: bool) -> tuple[str, list[Question]]:
    while True:
        context, turns = _TASKS[skill](rng)
        if skill == "mixing" or _is_reserved(context) == evaluation:
            return context, turns


def _is_reserved(context: str) -> bool:
    return zlib.crc32(context.encode()) % 8 == 0


def _with_context(context: str, question: Question) -> Question:
    return Question(question.skill, f"{context} {question.text}", question.answer)


def _reversal(rng: random.Random) -> tuple[str, list[Question]]:
    words = rng.sample(_THINGS, rng.choice((2, 3, 3, 3)))
    turns = [Question("reversal", "what is the reverse ?", " ".join(reversed(words)))]
    return " ".join(words) + " .", turns


def _mixing(rng: random.Random) -> tuple[str, list[Question]]:
    *parts, result = rng.choice(_MIXTURES)
    rng.shuffle(parts)
    return f"mix {parts[0]} and {parts[1]} .", [Question("mixing", "what color is it ?", result)]


def _prices(rng: random.Random) -> tuple[str, list[Question]]:
    things, prices = rng.sample(_THINGS, 2), rng.sample(range(1, 10), 2)
    cheap, dear = sorted(things, key=lambda thing: prices[things.index(thing)])
    asked = rng.randrange(2)
    turns = [
        Question("prices", f"what does the {things[asked]} cost ?", str(prices[asked])),
        Question(
            "prices", *rng.choice((("what costs more ?", dear), ("what costs less ?", cheap)))
        ),
    ]
    rng.shuffle(turns)
    context = f"a {things[0]} costs {prices[0]} , a {things[1]} costs {prices[1]} ."
    return context, turns


_TASKS = {
    "reversal": _reversal,
    "mixing": _mixing,
    "prices": _prices,
}
