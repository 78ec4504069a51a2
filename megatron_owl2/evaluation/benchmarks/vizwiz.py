"""VizWiz (Gurari et al. 2018): questions that blind people asked about images they had taken.

Files are the published train.json, val.json and test.json; the last has no answers. Many questions
cannot be answered, and LLaVA-1.5's request, which is used, says what to answer then. Whether
mPLUG-Owl2 said so is not published; `--prompt-suffix` asks without.
"""

from pathlib import Path

from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import named_image
from megatron_owl2.evaluation.rows import (
    Optional,
    list_of,
    object_of,
    read_rows,
    rows_by_id,
    text,
    words,
)
from megatron_owl2.evaluation.vqa_accuracy import VARIANTS, evalai_submission, most_common, score

_SKILL = "question"
_ANSWERS = {
    "image": words,
    "answers": list_of(object_of(answer=text), at_least=2),
    "answer_type": Optional(words, _SKILL),
}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions of a file of VizWiz, one to an image, whose name is their id."""
    rows = rows_by_id(path, read_rows(path, {"image": words, "question": words}), "image")
    return [
        Question(
            id=i,
            text=row["question"],
            images=(named_image(path, row["image"]),),
            skill=gold[i]["skill"] if gold else _SKILL,
            gold=gold[i]["majority"] if gold else None,
        )
        for i, row in rows.items()
    ]


def read_gold(path: Path) -> Gold:
    """The annotators' answers by the name of the image."""
    gold = {}
    for i, row in rows_by_id(path, read_rows(path, _ANSWERS), "image").items():
        answers = [answer["answer"] for answer in row["answers"]]
        gold[i] = {
            "answers": answers,
            "skill": row["answer_type"],
            "majority": most_common(answers),
        }
    return gold


BENCHMARK = Benchmark(
    about="VizWiz, questions of blind people, scored per type of answer",
    file="*.json",
    gold_file="*.json",
    id_field="image",
    answer_field="answer",
    suffix=(
        "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    ),
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=VARIANTS,
    submission=evalai_submission("image"),
)
