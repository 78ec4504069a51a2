"""ScienceQA (Lu et al. 2022), IMG test: the questions of the test split that have an image."""

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import choices
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import one_of_named
from megatron_owl2.evaluation.prompts import ADAPTER_CHOICE
from megatron_owl2.evaluation.rows import (
    Optional,
    list_of,
    object_of,
    place_of,
    read_object,
    text,
    whole_number,
    words,
)

_FIELDS = {
    "question": words,
    "choices": list_of(words, at_least=2),
    "answer": whole_number,
    "hint": Optional(text, ""),
    "image": Optional(text, ""),
    "subject": words,
    "split": words,
}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions with their hints; images lie in `images/test/<id>/` or `images/<id>/`."""
    return [
        Question(
            id=i,
            text=choices.show(row["question"], row["options"], row["hint"]),
            images=(one_of_named(path, f"test/{i}/{row['image']}", f"{i}/{row['image']}"),),
            skill=row["skill"],
            gold=row["answer"],
        )
        for i, row in gold.items()
    ]


def read_gold(path: Path) -> Gold:
    """Problems of the test split with an image, by their ids, which are texts.

    Raises TaskError for an answer that is none of the choices.
    """
    gold = {}
    for i, row in read_object(path, object_of(**_FIELDS)).items():
        if row["split"] != "test" or not row["image"]:
            continue
        if row["answer"] >= len(row["choices"]):
            raise TaskError(
                f"{path}: the answer of problem {i!r} is {row['answer']}, but it has "
                f"{len(row['choices'])} choices, counted from 0{place_of(row)}"
            )
        choices.check_count(row["choices"], f"{path}: problem {i!r}{place_of(row)}")
        gold[i] = {
            "question": row["question"],
            "hint": row["hint"],
            "image": row["image"],
            "options": row["choices"],
            "answer": choices.LETTERS[row["answer"]],
            "skill": row["subject"],
        }
    return gold


def pick(answer: str, row: Mapping) -> str:
    """The option that LLaVA's evaluation reads: a letter alone, one before ". ", or the only one
    after "The answer is ", with any character behind it."""
    begun = re.match(r"[A-E]\. ", answer)
    said = re.findall(r"The answer is ([A-Z]).", answer)
    if answer not in tuple("ABCDE"):
        answer = begun[0][0] if begun else said[0] if len(said) == 1 else ""
    return choices.whole_answer(answer, row)


def score(predictions: Mapping, gold: Mapping) -> dict:
    """Accuracy under LLaVA's rule, per subject; raises ScoreError."""
    return choices.score_choices(predictions, gold, pick)


BENCHMARK = Benchmark(
    about="ScienceQA's test questions with an image, multiple choice",
    file="problems.json",
    gold_file="problems.json",
    id_field="question_id",
    answer_field="text",
    suffix=choices.ANSWER_WITH_LETTER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    columns=choices.COLUMNS,
    official=ADAPTER_CHOICE,
    split="test",
)
