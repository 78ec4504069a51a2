"""The pair of files of VQA, which OK-VQA has too: questions, and ten annotators' answers to each.

The first is {questions: [{question_id, image_id, question}]}, the second {annotations:
[{question_id, image_id, multiple_choice_answer, answers: [{answer, answer_confidence}]}]}.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.formats.common.annotation_files import (
    published_file,
    read_annotations,
    unexpected,
)
from data_prep.formats.common.coco_images import COCO_FOLDERS, coco_names
from data_prep.formats.common.image_questions import (
    Fault,
    Merger,
    Pair,
    Payload,
    identifier,
    plan_images,
    read_images,
)
from data_prep.formats.common.inputs import SkipError, images_folder, refuse_columns, shown
from data_prep.splits import InputPlan, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record, strip_text
from megatron_owl2.errors import PreprocessError

_QUESTION = ("questions", "question_id", "image_id", "question")
_ANNOTATION = (
    "annotations",
    "question_id",
    "image_id",
    "multiple_choice_answer",
    "answers",
    "answer",
    "answer_confidence",
)
_WEIGHTS = {"yes": 2, "maybe": 1, "no": 0}  # by an annotator's confidence in his answer


class _Annotation(NamedTuple):
    image_id: str
    answer: str = ""
    fault: Fault | None = None


@dataclass(frozen=True)
class VqaFiles:
    """Open questions on images of COCO in the form of VQA; `questions` is the published name of the
    questions of the training split."""

    name: str
    questions: str

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` images.

        `source` is the file of the questions, or the folder that holds it; the annotations lie
        beside it. Raises PreprocessError if one of the two is missing or something else.
        """
        refuse_columns(options)
        questions = published_file(source, self.questions)
        images_folder(questions, options)
        rows, digest = _rows(questions, _QUESTION, "questions")
        answers = _annotations_of(questions)
        annotations, digest_of_answers = _rows(answers, _ANNOTATION, "annotations")
        merger = Merger()
        _join(rows, _answers(annotations, merger, answers.name), merger, questions.name)
        identity = f"{digest} {digest_of_answers}"
        return plan_images(self.name, questions, identity, merger.images(), options, COCO_FOLDERS)

    def read(self, payload: Payload) -> Iterator[Record | Skipped]:
        """Records of images with their questions; the key is the image's number."""
        return read_images(payload, coco_names)


def most_confident(answers: Any, multiple_choice_answer: Any) -> str:
    """The answer of the annotators' vote, in which each counts as much as he was confident.

    An `answer_confidence` of yes counts 2, maybe 1, no 0; equal answers add up. Of several with the
    largest sum it is the one that more annotators gave, then the published
    `multiple_choice_answer` (the most frequent one, whatever the confidence), then the first in
    the list. An empty answer does not take part. Raises SkipError if no answer is left.
    """
    if not isinstance(answers, list):
        raise SkipError("no list of answers", shown(answers))
    sums: dict[str, int] = {}
    counts: dict[str, int] = {}
    for row in answers:
        if not isinstance(row, dict) or not isinstance(row.get("answer"), str):
            raise SkipError("an annotator's answer is not a text", shown(row))
        confidence = row.get("answer_confidence")
        if not isinstance(confidence, str) or confidence not in _WEIGHTS:
            raise SkipError("answer_confidence is neither yes, maybe nor no", shown(confidence))
        if answer := strip_text(row["answer"]):
            sums[answer] = sums.get(answer, 0) + _WEIGHTS[confidence]
            counts[answer] = counts.get(answer, 0) + 1
    if not sums:
        raise SkipError("empty answer")
    return max(sums, key=lambda a: (sums[a], counts[a], a == multiple_choice_answer))


def _annotations_of(questions: Path) -> Path:
    """File of the annotations, beside that of the questions; raises PreprocessError if missing."""
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    path = questions.with_name(name)
    if name == questions.name:
        raise PreprocessError(
            f"{questions}: its annotations are not known by this name; call the files "
            "NAME_questions.json and NAME_annotations.json"
        )
    if not path.is_file():
        raise PreprocessError(f"{path} does not exist; the annotations of {questions} go there")
    return path


def _rows(path: Path, fields: tuple[str, ...], kind: str) -> tuple[list, str]:
    """Entries of a file and its digest; raises PreprocessError if it is not that of this `kind`."""
    content, digest = read_annotations(path, fields)
    rows = content.get(kind) if isinstance(content, dict) else None
    expected = f"VQA's file of {kind}, an object with a list {kind!r}"
    if not isinstance(rows, list):
        raise unexpected(path, expected, content)
    if not any(isinstance(row, dict) and "question_id" in row for row in rows):
        raise unexpected(path, f"{expected} of objects with a question_id", rows)
    return rows, digest


def _answers(rows: list, merger: Merger, file: str) -> dict[str, _Annotation]:
    """Annotations by question id; those without an id and repeated ones go to the merger."""
    found: dict[str, _Annotation] = {}
    for number, row in enumerate(rows):
        try:
            question_id, image_id = _ids(row)
            if question_id in found:
                raise SkipError("question id occurs twice", f"question {shown(question_id)}")
        except SkipError as error:
            merger.refuse(error, f"{file}, annotations[{number}]")
            continue
        try:
            answer = most_confident(row.get("answers"), row.get("multiple_choice_answer"))
            found[question_id] = _Annotation(image_id, answer)
        except SkipError as error:
            found[question_id] = _Annotation(image_id, fault=Fault(str(error), error.met))
    return found


def _join(rows: list, annotations: dict[str, _Annotation], merger: Merger, file: str) -> None:
    """Hand every question to the merger with its answer, then annotations without a question."""
    asked = set()
    for number, row in enumerate(rows):
        try:
            question_id, image_id = _ids(row)
        except SkipError as error:
            merger.refuse(error, f"{file}, questions[{number}]")
            continue
        asked.add(question_id)
        fault, answer = Fault("question without an annotation"), None
        if annotation := annotations.get(question_id):
            fault, answer = annotation.fault, annotation.answer
            if annotation.image_id != image_id:
                met = f"annotated on image {shown(annotation.image_id)}"
                fault = Fault("question and annotation are of different images", met)
        merger.add(image_id, Pair(question_id, row.get("question"), answer, fault))
    for question_id, annotation in annotations.items():
        if question_id not in asked:
            fault = Fault("annotation without a question")
            merger.add(annotation.image_id, Pair(question_id, fault=fault))


def _ids(row: Any) -> tuple[str, str]:
    """Ids of a question and of its image; that of an image without zeros before it."""
    if not isinstance(row, dict):
        raise SkipError("entry is not an object with question_id and image_id", shown(row))
    question_id = identifier(row.get("question_id"), "question_id")
    image_id = identifier(row.get("image_id"), "image_id")
    return question_id, image_id.lstrip("0") or image_id
