"""Files of questions and annotations in the format of VQA, which OK-VQA has as well.

Questions lie under `questions`, ten annotators' answers to each under `annotations` of another
file; images are COCO's. OK-VQA has no `multiple_choice_answer`; the most common answer is taken.
"""

import re
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.benchmark import Gold, Question
from megatron_owl2.evaluation.image_files import NumberedImages
from megatron_owl2.evaluation.rows import (
    Optional,
    identifier,
    list_of,
    object_of,
    place_of,
    read_rows,
    read_value,
    rows_by_id,
    text,
    whole_number,
    with_ids_of,
    words,
)
from megatron_owl2.evaluation.vqa_accuracy import most_common

_QUESTION = {"question_id": identifier, "image_id": whole_number, "question": words}
_ANNOTATION = {
    "question_id": identifier,
    "image_id": Optional(whole_number),
    "question_type": words,
    "answers": list_of(object_of(answer=text), at_least=2),  # each counts beside the others
    "multiple_choice_answer": Optional(text),
}
_SPLIT = re.compile(r"(?:^|_)(train|val|test)(?:-dev)?(\d{4})(?:_|$)")


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions of a published file.

    Raises TaskError if there is gold, but none for some of them, or gold of another image.
    """
    rows = rows_by_id(path, read_rows(path, _QUESTION, "questions"), "question_id")
    if gold:
        rows = with_ids_of(gold, rows)
        _check_annotations(path, rows, gold)
    images = NumberedImages(path, _split(path))
    return [
        Question(
            id=i,
            text=row["question"],
            images=(images.find(row["image_id"]),),
            skill=gold[i]["skill"] if gold else "question",
            gold=gold[i]["majority"] if gold else None,
        )
        for i, row in rows.items()
    ]


def _check_annotations(path: Path, rows: dict, gold: Gold) -> None:
    unanswered = [i for i in rows if i not in gold]
    if unanswered:
        raise TaskError(
            f"{len(unanswered)} questions of {path} have no annotation, such as {unanswered[0]!r}"
        )
    for i, row in rows.items():
        about = gold[i]["image_id"]
        if about not in (None, row["image_id"]):
            raise TaskError(
                f"{path}: question {i} is about image {row['image_id']}, its annotation about "
                f"{about}; the two files do not belong together{place_of(row)}"
            )


def _split(questions: Path) -> str | None:
    """The split of COCO that a question file says it is about, by its `data_subtype` or its name;
    test-dev2015 asks about images of test2015."""
    for name in (read_value(questions, "data_subtype"), questions.stem):
        if isinstance(name, str) and (found := _SPLIT.search(name)):
            return found[1] + found[2]
    return None


def read_vqav2_gold(path: Path) -> Gold:
    """VQAv2's annotations by question id, with their own `multiple_choice_answer`."""
    rows = read_rows(path, _ANNOTATION | {"multiple_choice_answer": text}, "annotations")
    return _gold(path, rows)


def read_okvqa_gold(path: Path) -> Gold:
    """OK-VQA's annotations by question id; `answer` is scored, not `raw_answer`, as typed."""
    return _gold(path, read_rows(path, _ANNOTATION, "annotations"))


def _gold(path: Path, annotations: list[dict]) -> Gold:
    gold = {}
    for i, row in rows_by_id(path, annotations, "question_id").items():
        answers = [answer["answer"] for answer in row["answers"]]
        gold[i] = {
            "image_id": row["image_id"],
            "answers": answers,
            "skill": row["question_type"],
            "majority": row.get("multiple_choice_answer") or most_common(answers),
        }
    return gold
