"""OwlEval (Ye et al. 2023): 82 open questions on 50 images, whose answers people rate from A to D.

20 images have a conversation: a question that is of both categories, and 32 that are "multi_turn"
only, which are asked after it and the model's own answers. So 50 answers are single-turn and 52
multi-turn. Of the published ratings there are counts only. `owl2 evaluate rating-sheet` makes
sheets for people, and `score` counts the ratings of one model's answers, a row {question_id,
answer} with the letter of each.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.errors import ScoreError
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import named_file, named_image
from megatron_owl2.evaluation.raters import Raters
from megatron_owl2.evaluation.rows import (
    Optional,
    identifier,
    list_of,
    read_rows,
    rows_by_id,
    short,
    words,
)
from megatron_owl2.evaluation.scoring import RATINGS, check_ids, count_ratings, group_by_skill

_FIELDS = {
    "image": words,
    "question_id": identifier,
    "question": words,
    "ability": words,
    "category": Optional(list_of(words), ()),
}
_CASES = "cases"  # the published folder of images
_SINGLE, _MULTI = "single-turn", "multi-turn"
_ABILITIES = {
    "a": "instruction understanding",
    "b": "visual understanding",
    "c": "optical character recognition",
    "d": "knowledge transfer",
    "e": "reasoning",
    "f": "multi-turn dialogue",
}
_SOURCE = "counts in the README of X-PLUG/mPLUG-Owl, its figure of OwlEval"
_PUBLISHED = {  # A, B, C and D of single-turn and of multi-turn answers
    "mPLUG-Owl": ((32, 10, 8, 0), (31, 8, 13, 0)),
    "MiniGPT-4": ((35, 3, 10, 2), (25, 6, 21, 0)),
    "LLaVA": ((23, 12, 13, 2), (16, 17, 19, 0)),
    "BLIP-2": ((13, 13, 9, 15), (13, 10, 17, 12)),
    "OpenFlamingo": ((5, 5, 15, 25), (4, 4, 16, 28)),
}
# "Cannot be traced": what MM-REACT's published answers have in 14 places.
_LOST = "\u65e0\u6cd5\u56de\u6eaf"


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions; images lie in `images/` or, as published, in `cases/`."""
    questions: list[Question] = []
    before: Mapping = {}
    for i, row in gold.items():
        goes_on = row["categories"] == [_MULTI] and row["image"] == before.get("image")
        follows = questions[-1].id if goes_on else None
        image, skills = _image(path, row["image"]), ", ".join(row["skills"])
        questions.append(Question(i, row["question"], (image,), skills, None, follows=follows))
        before = row
    return questions


def _image(path: Path, name: str) -> Path:
    published = named_file(path, name, _CASES)
    return published if published.is_file() else named_image(path, name)


def read_gold(path: Path) -> Gold:
    """The rows by id, with their abilities "a" to "f" and then their `categories` as `skills`;
    nothing is right or wrong."""
    gold = {}
    for i, row in rows_by_id(path, read_rows(path, _FIELDS), "question_id").items():
        abilities = sorted({*re.findall("[^, ]+", row["ability"])})
        # One of the published rows has "]single_turn".
        named = {"-".join(re.findall("[a-z]+", name.lower())) for name in row["category"]}
        categories = [name for name in (_SINGLE, _MULTI) if name in named]
        added = {"categories": categories, "skills": abilities + categories}
        gold[i] = row | {"answer": None, **added}
    return gold


def score(ratings: Mapping, gold: Mapping) -> dict:
    """How often each rating was given, overall, per ability and per category.

    Raises ScoreError for missing or unknown ids and for what is no rating.
    """
    check_ids(ratings, gold)
    letters = {i: text.strip().upper() for i, text in ratings.items()}
    if wrong := [i for i, letter in letters.items() if letter not in RATINGS]:
        raise ScoreError(
            f"{len(wrong)} ratings are none of A, B, C and D, such as "
            f"{short(repr(ratings[wrong[0]]))} for {wrong[0]!r}; they are people's, "
            "not the model's answers"
        )
    skills = group_by_skill(
        (skill, letters[i]) for i, row in gold.items() for skill in row["skills"]
    )
    return {
        "overall": count_ratings(list(letters.values())),
        "skills": {name: count_ratings(found) for name, found in sorted(skills.items())},
    }


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """JSON lines as the published answers of other models, without a `model_id`."""
    rows = [
        {name: row[name] for name in ("image", "question_id", "question")}
        | {"answer": predictions[i]}
        for i, row in gold.items()
    ]
    lines = (json.dumps(row) + "\n" for row in rows)
    return "owleval_answer.jsonl", "".join(lines).encode()


def _is_lost(answer: str) -> bool:
    return answer.strip(" .\n") == _LOST


RATERS = Raters(
    source=_SOURCE,
    published={
        category: {
            model: dict(zip(RATINGS, counts[place], strict=True))
            for model, counts in _PUBLISHED.items()
        }
        for place, category in enumerate((_SINGLE, _MULTI))
    },
    skills=_ABILITIES,
    is_lost=_is_lost,
)
BENCHMARK = Benchmark(
    about="OwlEval, open questions; people rate the answers",
    file="questions*.jsonl",
    gold_file="questions*.jsonl",
    id_field="question_id",
    answer_field="answer",
    suffix="",
    max_new_tokens=512,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    columns=("A", "B", "C", "D", "n"),
    submission=submission,
    unanswered_rows=True,
    raters=RATERS,
)
