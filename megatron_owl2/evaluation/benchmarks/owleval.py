"""OwlEval (Ye et al. 2023): 82 open questions on 50 images, whose answers people rate from A to D.

No ratings were published. An evaluation asks the questions, each as a first one, also those that
follow others on their image; `owl2 evaluate rating-sheet` makes sheets for people, and `score`
counts the ratings of one model's answers, a row {question_id, answer} with the letter of each.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.errors import ScoreError
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import named_file, named_image
from megatron_owl2.evaluation.rows import identifier, read_rows, rows_by_id, short, words
from megatron_owl2.evaluation.scoring import RATINGS, check_ids, count_ratings, group_by_skill

_FIELDS = {"image": words, "question_id": identifier, "question": words, "ability": words}
_CASES = "cases"  # the published folder of images


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions; images lie in `images/` or, as published, in `cases/`."""
    return [
        Question(i, row["question"], (_image(path, row["image"]),), ", ".join(row["skills"]), None)
        for i, row in gold.items()
    ]


def _image(path: Path, name: str) -> Path:
    published = named_file(path, name, _CASES)
    return published if published.is_file() else named_image(path, name)


def read_gold(path: Path) -> Gold:
    """The rows by id, with their abilities "a" to "f" as `skills`; nothing is right or wrong."""
    rows = rows_by_id(path, read_rows(path, _FIELDS), "question_id")
    return {
        i: row | {"answer": None, "skills": sorted({*re.findall("[^, ]+", row["ability"])})}
        for i, row in rows.items()
    }


def score(ratings: Mapping, gold: Mapping) -> dict:
    """How often each rating was given, overall and per ability.

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
)
