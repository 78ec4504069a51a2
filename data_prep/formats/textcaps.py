"""TextCaps as published: {data: [{image_id, caption_str, ...}]}, five rows an image.

One caption of each image, drawn by its id, becomes the answer to a question, as the paper's tuning
data have it. `--images` is `train_images` of TextVQA's archive, or a folder that holds it; images
are named after their ids.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.formats.common.annotation_files import published_file
from data_prep.formats.common.encodings import check_data
from data_prep.formats.common.inputs import (
    SkipError,
    caption,
    cut_rows,
    image_folders,
    images_folder,
    read_first_image,
    record_key,
    refuse_columns,
    shown,
    skipped,
)
from data_prep.formats.common.one_caption import captioning, draw_caption
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import BadSampleError, PreprocessError
from megatron_owl2.utils.json_text import parse_json

_FILE = "TextCaps_0.1_train.json"
_Row = tuple[Any, Any]  # an image's id and its caption


class TextCaps:
    """Captions that read the text in an image; one sample an image."""

    name = "textcaps"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` images.

        `source` is the file, or the folder that holds it. Raises PreprocessError if the file is not
        of this form, or without a folder of images.
        """
        refuse_columns(options)
        path = published_file(source, _FILE)
        check_data(path)
        data = path.read_bytes()
        folders = image_folders(images_folder(path, options), ("train_images",))
        rows = [
            (image_id, draw_caption(image_id, found)[1])
            for image_id, found in _captions(data, path).items()
        ]
        digest = hashlib.sha256(data).hexdigest()
        return cut_rows(
            rows, options.samples_per_split, path, digest, lambda some: (some, folders, path)
        )

    def read(
        self, payload: tuple[list[_Row], tuple[Path, ...], Path]
    ) -> Iterator[Record | Skipped]:
        """Records of consecutive images; the key is the image's id."""
        rows, folders, source = payload
        for image_id, text in rows:
            try:
                metadata: dict[str, Any] = {"image_id": image_id}
                yield Record(
                    record_key(str(image_id), metadata),
                    images=(read_first_image(folders, [f"{image_id}.jpg"]),),
                    turns=captioning(caption(text)),
                    source=source.stem,
                    metadata=metadata,
                )
            except (SkipError, BadSampleError) as error:
                yield skipped(error, f"{source.name}, image {shown(image_id)}")


def _captions(data: bytes, source: Path) -> dict[Any, list[tuple[Any, Any]]]:
    """Captions (id, text) by the image's id, in the file's order; rows of an image need not be
    neighbours."""
    try:
        content = parse_json(data)
    except ValueError as error:
        raise PreprocessError(f"{source} is not JSON: {error}") from None
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise PreprocessError(f"{source} is not of TextCaps: it must be an object with a list data")
    captions: dict[Any, list[tuple[Any, Any]]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("image_id"), str | int):
            raise PreprocessError(f"{source} is not of TextCaps: data[{number}] has no image_id")
        entry = row.get("caption_id"), row.get("caption_str")
        captions.setdefault(row["image_id"], []).append(entry)
    return captions


FORMATS: tuple[Format, ...] = (TextCaps(),)
