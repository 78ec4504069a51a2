"""POPE (Li et al. 2023): whether an object is in the image, to be answered with yes or no.

coco_pope_random.json has 2,910 rows in the version that mPLUG-Owl2's figures are of (commit e3e3926
of POPE's repository) and 3,000 in later ones: `n` in the scores tells which was asked.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.evaluation.benchmark import SHORT_ANSWER, Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import named_image
from megatron_owl2.evaluation.prompts import BELOW
from megatron_owl2.evaluation.rows import identifier, one_of, read_rows, rows_by_id, words
from megatron_owl2.evaluation.scoring import check_ids, percent, score_table

_SKILL = "existence"
_GOLD = {"question_id": identifier, "label": one_of("yes", "no")}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions of a file of POPE, which holds their gold too."""
    rows = read_rows(path, _GOLD | {"text": words, "image": words})
    return [
        Question(i, row["text"], (named_image(path, row["image"]),), _SKILL, gold[i]["label"])
        for i, row in rows_by_id(path, rows, "question_id").items()
    ]


def read_gold(path: Path) -> Gold:
    """The rows of a file of POPE by question id; each has a `label` "yes" or "no"."""
    return rows_by_id(path, read_rows(path, _GOLD), "question_id")


def score(predictions: Mapping, gold: Mapping) -> dict:
    """POPE on rows with a `label` "yes" or "no"; percentages with "yes" as the positive class.

    A prediction is "no" if its text before the first period has the word No, no or not, and "yes"
    otherwise; `unclear` counts those that are "yes" without the word yes in any letter case.
    Precision, recall and F1 are 0 where they would divide by zero. Raises ScoreError for missing
    or unknown ids.
    """
    check_ids(predictions, gold)
    said = {i: yes_or_no(text) for i, text in predictions.items()}
    table = score_table(
        [(_SKILL, row, said[i]) for i, row in gold.items()],
        lambda row: row["label"],
        lambda answer, row: float(answer == row["label"]),
    )
    pairs = Counter((said[i], row["label"]) for i, row in gold.items())
    hits = pairs["yes", "yes"]
    answered_yes, are_yes = hits + pairs["yes", "no"], hits + pairs["no", "yes"]
    table["overall"] |= {
        "precision": percent(hits, answered_yes),
        "recall": percent(hits, are_yes),
        "f1": percent(2 * hits, answered_yes + are_yes),
        "yes_ratio": percent(answered_yes, len(gold)),
        "unclear": sum(
            answer == "yes" and not re.search(r"\byes\b", predictions[i], re.IGNORECASE)
            for i, answer in said.items()
        ),
    }
    table["skills"][_SKILL] = dict(table["overall"])
    return table


def yes_or_no(text: str) -> str:
    """ "yes" or "no" as POPE's published evaluation reads an answer."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


BENCHMARK = Benchmark(
    about="POPE, yes or no: is there such an object in the image",
    file="*pope_*.json",
    gold_file="*pope_*.json",
    id_field="question_id",
    answer_field="answer",
    suffix=SHORT_ANSWER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    official=BELOW,
)
