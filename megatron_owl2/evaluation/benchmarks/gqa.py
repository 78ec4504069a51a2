"""GQA (Hudson and Manning 2019): compositional questions on images, one answer to each.

Files are the published ones, objects of {question id: row}. The paper names "test-balanced", whose
answers are not published; scores are of testdev_balanced_questions.json (12,578 questions), as
LLaVA-1.5's are.
"""

import json
import string
from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.evaluation.benchmark import SHORT_ANSWER, Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import named_image
from megatron_owl2.evaluation.prompts import BELOW
from megatron_owl2.evaluation.rows import (
    Optional,
    identifier,
    object_of,
    read_object,
    words,
)
from megatron_owl2.evaluation.scoring import check_ids, score_table

_SKILL = "question"
_ANSWERS = object_of(
    answer=words, types=Optional(object_of(structural=words), {"structural": _SKILL})
)
_NO_MARKS = str.maketrans("", "", string.punctuation)


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions of a file of GQA, which holds their gold too."""
    rows = read_object(path, object_of(question=words, imageId=identifier))
    return [
        Question(
            id=i,
            text=row["question"],
            images=(named_image(path, f"{row['imageId']}.jpg"),),
            skill=gold[i]["types"]["structural"] if gold else _SKILL,
            gold=gold[i]["answer"] if gold else None,
        )
        for i, row in rows.items()
    ]


def read_gold(path: Path) -> Gold:
    """The rows of a file of GQA by question id."""
    return {**read_object(path, _ANSWERS)}


def score(predictions: Mapping, gold: Mapping, variant: str = "exact") -> dict:
    """Share of predictions that are the answer, per structural type of the question.

    "exact" compares as LLaVA-1.5 does, in lower case without final periods; "unpunctuated" leaves
    every mark of both sides out, as lmms-eval does. Raises ScoreError for missing or unknown ids.
    """
    check_ids(predictions, gold)
    normal = {"exact": _uploaded, "unpunctuated": _unpunctuated}[variant]

    def accuracy(prediction: str, row: Mapping) -> float:
        expected = row["answer"] if variant == "exact" else normal(row["answer"])
        return float(normal(prediction) == expected)

    return score_table(
        [(row["types"]["structural"], row, predictions[i]) for i, row in gold.items()],
        lambda row: row["answer"],
        accuracy,
    )


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """The file for GQA's server and its eval.py: a JSON list of questionId and prediction."""
    rows = [{"questionId": str(i), "prediction": _uploaded(t)} for i, t in predictions.items()]
    return "gqa.json", json.dumps(rows).encode()


def _uploaded(prediction: str) -> str:
    return prediction.rstrip(".").lower()


def _unpunctuated(text: str) -> str:
    return text.translate(_NO_MARKS).lower()


BENCHMARK = Benchmark(
    about="GQA, exact match, scored per structural type of the question",
    file="*questions.json",
    gold_file="*questions.json",
    id_field="questionId",
    answer_field="prediction",
    suffix=SHORT_ANSWER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=("exact", "unpunctuated"),
    submission=submission,
    official=BELOW,
)
