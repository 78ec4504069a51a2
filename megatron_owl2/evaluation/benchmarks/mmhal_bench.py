"""MMHal-Bench (Sun et al. 2023): 96 questions that tempt a model to hallucinate, judged by another.

An evaluation asks the questions and writes the file of responses that the published judge takes; it
gives no scores. `score` is of that judge's replies, a row {id, answer} with the text of each, where
ids are the places of the questions in response_template.json, from 0.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import one_of_named
from megatron_owl2.evaluation.rows import identifier, read_rows, text, words
from megatron_owl2.evaluation.scoring import check_ids, group_by_skill, percent

_FIELDS = {
    "question_type": words,
    "image_id": identifier,
    "image_src": words,
    "question": words,
    "gt_answer": text,
}
_BEST = 6
_WITHOUT_HALLUCINATION = 3  # the lowest rating of an answer without one


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions; an image is named as at its address or by its id."""
    return [
        Question(
            id=i,
            text=row["question"],
            images=(
                one_of_named(path, PurePosixPath(row["image_src"]).name, f"{row['image_id']}.jpg"),
            ),
            skill=row["question_type"],
            gold=row["gt_answer"],
        )
        for i, row in gold.items()
    ]


def read_gold(path: Path) -> Gold:
    """Rows by their place; what a person answered is for the judge, and nothing to compare."""
    return {i: row | {"answer": None} for i, row in enumerate(read_rows(path, _FIELDS))}


def score(replies: Mapping, gold: Mapping) -> dict:
    """Mean rating, 0 to 6, and percentage of hallucinations, overall and per type of question.

    `unreadable` counts replies without exactly one rating, which are rated 0 as the published
    evaluation does. Types are the rows' own; it takes places modulo 8 for them. Raises ScoreError
    for missing or unknown ids.
    """
    check_ids(replies, gold)
    ratings = {i: rating(text) for i, text in replies.items()}
    types = group_by_skill((row["question_type"], ratings[i]) for i, row in gold.items())
    return {
        "overall": _row(list(ratings.values())),
        "skills": {name: _row(found) for name, found in sorted(types.items())},
    }


def rating(reply: str) -> int | None:
    """The only "rating: 0" to "rating: 6" that a reply has, in any letter case, or None."""
    found = [n for n in range(_BEST + 1) if f"rating: {n}" in reply.lower()]
    return found[0] if len(found) == 1 else None


def _row(ratings: list[int | None]) -> dict:
    values = [value or 0 for value in ratings]
    return {
        "score": round(sum(values) / len(values), 3),
        "hallucinations": percent(sum(v < _WITHOUT_HALLUCINATION for v in values), len(values)),
        "unreadable": ratings.count(None),
        "n": len(values),
    }


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """The published template with every `model_answer`, in its order."""
    rows = [
        {name: value for name, value in row.items() if name != "answer"}
        | {"model_answer": predictions[i]}
        for i, row in gold.items()
    ]
    return "mmhal_bench.json", json.dumps(rows).encode()


BENCHMARK = Benchmark(
    about="MMHal-Bench, tempting questions; scores are of a judge's replies",
    file="response_template.json",
    gold_file="response_template.json",
    id_field="id",
    answer_field="answer",
    suffix="",
    max_new_tokens=512,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    columns=("score", "hallucinations", "unreadable", "n"),
    submission=submission,
    unanswered_rows=True,
)
