"""OCR-VQA (Mishra et al. 2019) as published: dataset.json, an object of book covers, {id:
{imageURL, questions: [...], answers: [...], split, ...}}.

Split 1 is for training, 2 for validation, 3 for testing. The images are downloaded into files named
by the ids, with the extension of the address.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.formats.common.annotation_files import (
    Entries,
    published_file,
    read_annotations,
    unexpected,
)
from data_prep.formats.common.image_questions import (
    Merger,
    Pair,
    Payload,
    plan_images,
    read_images,
)
from data_prep.formats.common.inputs import SkipError, images_folder, refuse_columns, shown
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record

_FILE = "dataset.json"
_FIELDS = ("questions", "answers", "split")
_SPLITS = {"1": "training", "2": "validation", "3": "test"}
_EXTENSIONS = ("jpg", "png", "gif", "jpeg")


class OcrVqa:
    """Questions on book covers of the training split."""

    name = "ocrvqa"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` covers.

        `source` is the file, or the folder that holds it. Raises PreprocessError if it is something
        else.
        """
        refuse_columns(options)
        path = published_file(source, _FILE)
        images_folder(path, options)
        content, digest = read_annotations(path, _FIELDS)
        if not isinstance(content, Entries) or not any(isinstance(row, dict) for _, row in content):
            expected = f"OCR-VQA's data, an object of ids and {{{', '.join(_FIELDS)}}}"
            raise unexpected(path, expected, content)
        merger, known = Merger(), set()
        for image_id, row in content:
            try:
                if image_id in known:
                    raise SkipError("id of a cover occurs twice")
                known.add(image_id)
                pairs = _pairs(image_id, row)
            except SkipError as error:
                merger.refuse(error, f"entry {shown(image_id)}")
                continue
            for pair in pairs:
                merger.add(image_id, pair)
        return plan_images(self.name, path, digest, merger.images(), options, ("images",))

    def read(self, payload: Payload) -> Iterator[Record | Skipped]:
        """Records of covers with their questions; the key is the cover's id."""
        return read_images(
            payload, lambda image_id: [f"{image_id}.{extension}" for extension in _EXTENSIONS]
        )


def _pairs(image_id: str, row: Any) -> list[Pair]:
    """Questions of a cover, numbered; raises SkipError if it has none for training."""
    if not isinstance(row, dict):
        raise SkipError(f"entry is not an object with {', '.join(_FIELDS)}", shown(row))
    split = _SPLITS.get(str(row.get("split")))
    if split is None:
        raise SkipError("split is not 1, 2 or 3", shown(row.get("split")))
    if split != "training":
        raise SkipError(f"{split} split")
    questions, answers = row.get("questions"), row.get("answers")
    if not isinstance(questions, list) or not isinstance(answers, list):
        raise SkipError("questions and answers are not lists", shown(row))
    if len(questions) != len(answers):
        met = f"{len(questions)} questions, {len(answers)} answers"
        raise SkipError("not as many answers as questions", met)
    if not questions:
        raise SkipError("no questions")
    return [
        Pair(f"{image_id}_{number}", question, answer)
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]


FORMATS: tuple[Format, ...] = (OcrVqa(),)
