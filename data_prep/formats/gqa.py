"""GQA (Hudson and Manning 2019) as published: train_balanced_questions.json, an object of question
ids, {id: {imageId, question, answer, ...}}."""

from collections.abc import Iterator
from pathlib import Path

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
    identifier,
    plan_images,
    read_images,
)
from data_prep.formats.common.inputs import SkipError, images_folder, refuse_columns, shown
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record

_FILE = "train_balanced_questions.json"
_FIELDS = ("imageId", "question", "answer")


class Gqa:
    """Questions on images with their short answers (`answer`, not the sentence `fullAnswer`)."""

    name = "gqa"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` images.

        `source` is the file of the questions, or the folder that holds it. Raises PreprocessError
        if it is something else.
        """
        refuse_columns(options)
        path = published_file(source, _FILE)
        images_folder(path, options)
        content, digest = read_annotations(path, _FIELDS)
        if not isinstance(content, Entries) or not any(isinstance(row, dict) for _, row in content):
            expected = f"GQA's questions, an object of ids and {{{', '.join(_FIELDS)}}}"
            raise unexpected(path, expected, content)
        merger = Merger()
        for question_id, row in content:
            try:
                if not isinstance(row, dict):
                    raise SkipError(f"entry is not an object with {', '.join(_FIELDS)}", shown(row))
                image_id = identifier(row.get("imageId"), "imageId")
            except SkipError as error:
                merger.refuse(error, f"question {shown(question_id)}")
                continue
            merger.add(image_id, Pair(question_id, row.get("question"), row.get("answer")))
        return plan_images(self.name, path, digest, merger.images(), options, ("images",))

    def read(self, payload: Payload) -> Iterator[Record | Skipped]:
        """Records of images with their questions; the key is the image's id."""
        return read_images(payload, lambda image_id: (f"{image_id}.jpg",))


FORMATS: tuple[Format, ...] = (Gqa(),)
