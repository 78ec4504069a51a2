"""MM-Vet (Yu et al. 2023): open questions on images, whose answers a language model judges.

An evaluation asks the questions and writes the file that the published evaluator takes; it gives no
scores. `score` is of that judge's replies, a row {id, answer} with the text of each: its grade.
The judge's prompt here is not the published one: see `--judge-prompt`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import named_image
from megatron_owl2.evaluation.judge import Judge
from megatron_owl2.evaluation.prompts import ADAPTER_OPEN
from megatron_owl2.evaluation.rows import list_of, object_of, read_object, text, words
from megatron_owl2.evaluation.scoring import check_ids, group_by_skill, percent

_ROW = object_of(imagename=words, question=words, answer=text, capability=list_of(words))


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions; their skill is all that they need, as "ocr, spat"."""
    return [
        Question(
            id=i,
            text=row["question"],
            images=(named_image(path, row["imagename"]),),
            skill=", ".join(row["capability"]),
            gold=row["reference"],
        )
        for i, row in gold.items()
    ]


def read_gold(path: Path) -> Gold:
    """Rows by id, such as "v1_0"; their answer is a judge's `reference` and nothing to compare."""
    rows = read_object(path, _ROW)
    return {i: row | {"reference": row["answer"], "answer": None} for i, row in rows.items()}


def score(replies: Mapping, gold: Mapping) -> dict:
    """Mean grade in percent, overall and of the questions that need each capability.

    A reply begins with a grade from 0 to 1; `unreadable` counts those that do not, which the
    published evaluator asks again and at last grades 0, as is done here. Raises ScoreError for
    missing or unknown ids.
    """
    check_ids(replies, gold)
    grades = {i: grade(text) for i, text in replies.items()}
    needed = group_by_skill(
        (name, grades[i]) for i, row in gold.items() for name in row["capability"]
    )
    return {
        "overall": _row(list(grades.values())),
        "skills": {name: _row(found) for name, found in sorted(needed.items())},
    }


def grade(reply: str) -> float | None:
    """The number from 0 to 1 that is a reply's first word, None if that is none."""
    try:
        value = float(reply.split()[0])
    except (ValueError, IndexError):
        return None
    return value if 0 <= value <= 1 else None


def _row(grades: list[float | None]) -> dict:
    read = [value for value in grades if value is not None]
    unreadable = len(grades) - len(read)
    return {"score": percent(sum(read), len(grades)), "unreadable": unreadable, "n": len(grades)}


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """The file of the published evaluator, {id: answer}."""
    return "mm-vet.json", json.dumps(dict(predictions)).encode()


_PROMPT = """\
Compare a prediction with the ground truth of a question and grade it from 0.0, all wrong, to 1.0, \
all right, in steps of 0.1. Where the ground truth joins parts by <AND>, all of them are needed \
and each that is missing costs its share; where it separates parts by <OR>, any one of them is \
enough. Complete the last row by its grade and write nothing else.

Question | Ground truth | Prediction | Grade
--- | --- | --- | ---
Which fruit lies on the table? | pear <AND> apple | a banana | 0.0
Which fruit lies on the table? | pear <AND> apple | There is an apple. | 0.5
Which fruit lies on the table? | pear <AND> apple | an apple beside a pear | 1.0
What colour is the car? | gray <OR> silver | It is silver. | 1.0
Why is the man running? | He is late: his bus leaves without him. | He exercises in the rain. | 0.1
Why is the man running? | He is late: his bus leaves without him. | To catch something. | 0.4
Why is the man running? | He is late: his bus leaves without him. | He missed his bus. | 0.9
{question} | {reference} | {prediction} | """


def _fields(answer: str, row: Mapping) -> dict[str, str]:
    reference = row["reference"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return {"question": row["question"], "reference": reference, "prediction": answer}


BENCHMARK = Benchmark(
    about="MM-Vet, open questions; scores are of a judge's replies",
    file="mm-vet*.json",
    gold_file="mm-vet*.json",
    id_field="id",
    answer_field="answer",
    suffix="\nAnswer the question directly.",
    max_new_tokens=512,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    columns=("score", "unreadable", "n"),
    submission=submission,
    unanswered_rows=True,
    judge=Judge(
        prompt=_PROMPT,
        fields=_fields,
        model="gpt-4-0613",
        max_tokens=3,
        readable=lambda reply: grade(reply) is not None,
        attempts=5,
        again="\nThe grade, a number from 0.0 to 1.0: ",
        warmer=True,
    ),
    official=ADAPTER_OPEN,
)
