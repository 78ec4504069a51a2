"""SEED-Bench-1 (Li et al. 2023), its nine image dimensions; questions on videos are not asked."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import choices
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import one_of_named
from megatron_owl2.evaluation.prompts import ADAPTER_CHOICE
from megatron_owl2.evaluation.rows import (
    identifier,
    one_of,
    read_rows,
    read_value,
    rows_by_id,
    whole_number,
    words,
)

_logger = logging.getLogger(__name__)

_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_FIELDS = dict.fromkeys(_CHOICES, words) | {
    "question_id": identifier,
    "question": words,
    "answer": one_of("a", "b", "c", "d"),
    "data_type": one_of("image", "video"),
    "data_id": words,
    "question_type_id": whole_number,
}
_PICKS = {"first_character": choices.first_character, "whole_answer": choices.whole_answer}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions on images, whose published files have no ending."""
    return [
        Question(
            id=i,
            text=choices.show(row["question"], row["options"]),
            images=(one_of_named(path, row["data_id"], f"SEED-Bench-image/{row['data_id']}"),),
            skill=row["skill"],
            gold=row["answer"],
        )
        for i, row in gold.items()
    ]


def read_gold(path: Path) -> Gold:
    """Questions on images by id, with the name of their dimension; those on videos are counted in
    the log. Raises TaskError for two questions of one id."""
    rows = read_rows(path, _FIELDS, "questions")
    if videos := sum(row["data_type"] == "video" for row in rows):
        _logger.warning("%d questions of %s are on videos and are not asked", videos, path)
    names = _dimensions(path)
    gold = {}
    of_images = [row for row in rows if row["data_type"] == "image"]
    for i, row in rows_by_id(path, of_images, "question_id").items():
        number = row["question_type_id"]
        gold[i] = {
            "question": row["question"],
            "options": [row[choice] for choice in _CHOICES],
            "answer": row["answer"].upper(),
            "data_id": row["data_id"],
            "skill": names.get(number, f"dimension {number}"),
        }
    return gold


def _dimensions(path: Path) -> dict[int, str]:
    """{number: name} of the dimensions that the file lists."""
    listed = read_value(path, "question_type") or {}
    if not isinstance(listed, dict) or not all(type(n) is int for n in listed.values()):
        raise TaskError(f"{path}: 'question_type' must give a whole number for every name")
    return {number: name for name, number in listed.items()}


def score(predictions: Mapping, gold: Mapping, variant: str = "first_character") -> dict:
    """Accuracy of generated letters over all questions, and per dimension.

    "first_character" looks at no more of an answer, as lmms-eval does; "whole_answer" wants the
    letter alone, as LLaVA's evaluation does. Raises ScoreError.
    """
    return choices.score_choices(predictions, gold, _PICKS[variant])


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """JSON lines for SEED-Bench's leaderboard."""
    rows = [{"question_id": i, "prediction": text.strip()[:1]} for i, text in predictions.items()]
    return "seed_bench.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()


BENCHMARK = Benchmark(
    about="SEED-Bench's questions on images, multiple choice",
    file="SEED-Bench*.json",
    gold_file="SEED-Bench*.json",
    id_field="question_id",
    answer_field="prediction",
    suffix=choices.ANSWER_WITH_LETTER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    columns=choices.COLUMNS,
    submission=submission,
    unanswered_rows=True,
    variants=("first_character", "whole_answer"),
    official=ADAPTER_CHOICE,
)
