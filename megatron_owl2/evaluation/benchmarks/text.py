"""Dialogues of one question and its answer without an image, scored by exact match."""

from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.rows import (
    Optional,
    identifier,
    list_of,
    object_of,
    place_of,
    read_rows,
    rows_by_id,
    short,
    text,
    words,
)
from megatron_owl2.evaluation.scoring import exact_match

_FIELDS = {
    "id": identifier,
    "conversations": list_of(object_of(**{"from": text, "value": words})),
    "skill": Optional(words, "text"),
}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions of the dialogues."""
    return [
        Question(i, row["question"], (), row["skill"], row["answers"][0]) for i, row in gold.items()
    ]


def read_gold(path: Path) -> Gold:
    """Question, answer and skill of each dialogue by its id.

    Raises TaskError for a dialogue that is not one question and its answer, or has an image.
    """
    gold = {}
    for i, row in rows_by_id(path, read_rows(path, _FIELDS), "id").items():
        if row.get("image") or row.get("images"):
            raise TaskError(
                f"{path}: dialogue {i!r} has an image, which this task does not show{place_of(row)}"
            )
        messages = row["conversations"]
        roles = [message["from"] for message in messages]
        if roles != ["human", "gpt"]:
            raise TaskError(
                f"{path}: dialogue {i!r} must be one question and its answer (human, gpt); it is "
                f"{short(', '.join(map(repr, roles)))}{place_of(row)}"
            )
        question, answer = (message["value"] for message in messages)
        gold[i] = {"question": question, "answers": [answer], "skill": row["skill"]}
    return gold


BENCHMARK = Benchmark(
    about="dialogues of one turn without an image, exact match",
    file="*.json",
    gold_file="*.json",
    id_field="id",
    answer_field="answer",
    suffix="",
    max_new_tokens=32,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=exact_match,
)
