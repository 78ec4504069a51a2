"""TextCaps as published: {data: [{image_id, caption_str, ...}]}, five rows an image.

One caption of each image, drawn by its id, becomes the answer to a question, as the paper's tuning
data have it. `--images` is the folder of the images, `train_images` of TextVQA's archive, which are
named after their ids.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.formats.common.encodings import check_data
from data_prep.formats.common.inputs import (
    SkipError,
    caption,
    cut_rows,
    images_folder,
    read_image,
    record_key,
    refuse_columns,
    shown,
    skipped,
)
from data_prep.formats.common.one_caption import captioning, draw
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record, strip_text
from megatron_owl2.errors import BadSampleError, PreprocessError
from megatron_owl2.utils.json_text import parse_json

_Row = tuple[Any, Any]  # an image's id and its caption, None: it has none


class TextCaps:
    """Captions that read the text in an image; one sample an image."""

    name = "textcaps"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` images.

        Raises PreprocessError if the file is not of this form, or without a folder of images.
        """
        refuse_columns(options)
        if not source.is_file():
            raise PreprocessError(f"{source} is not a file; name TextCaps_0.1_train.json")
        check_data(source)
        data = source.read_bytes()
        images = images_folder(source, options)
        rows = [
            (image_id, draw(image_id, found) if found else None)
            for image_id, found in _captions(data, source).items()
        ]
        digest = hashlib.sha256(data).hexdigest()
        return cut_rows(
            rows, options.samples_per_split, source, digest, lambda some: (some, images, source)
        )

    def read(self, payload: tuple[list[_Row], Path, Path]) -> Iterator[Record | Skipped]:
        """Records of consecutive images; the key is the image's id."""
        rows, images, source = payload
        for image_id, text in rows:
            try:
                if text is None:
                    raise SkipError("image without a caption")
                metadata: dict[str, Any] = {"image_id": image_id}
                yield Record(
                    record_key(str(image_id), metadata),
                    images=(read_image(images, f"{image_id}.jpg"),),
                    turns=captioning(caption(text)),
                    source=source.stem,
                    metadata=metadata,
                )
            except (SkipError, BadSampleError) as error:
                yield skipped(error, f"{source.name}, image {shown(image_id)}")


def _captions(data: bytes, source: Path) -> dict[Any, list[str]]:
    """Captions by the image's id, in the file's order; rows of an image need not be neighbours."""
    try:
        content = parse_json(data)
    except ValueError as error:
        raise PreprocessError(f"{source} is not JSON: {error}") from None
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise PreprocessError(f"{source} is not of TextCaps: it must be an object with a list data")
    captions: dict[Any, list[str]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("image_id"), str | int):
            raise PreprocessError(f"{source} is not of TextCaps: data[{number}] has no image_id")
        found = captions.setdefault(row["image_id"], [])
        text = row.get("caption_str")
        if isinstance(text, str) and strip_text(text):
            found.append(text)
    return captions


FORMATS: tuple[Format, ...] = (TextCaps(),)
