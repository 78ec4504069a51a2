"""COCO captions as published: JSON of images: [{id, file_name}] and annotations: [{id, image_id,
caption}].

An image has about five captions. `coco` makes a record of each, as pre-training pairs are made;
`coco-one-caption` draws one for each image, of those that can be used; `coco-instruction` makes it
the answer to a question, as the paper's tuning data have it. `--images` is the folder of the
images, or one above the folders in which they are published (train2014 and so on).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_prep.formats.common.coco_images import COCO_FOLDERS
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

_Row = tuple[Any, Any, Any, Any]  # image's id and file, caption's id and text; None: not there


@dataclass(frozen=True)
class Coco:
    """Captions of COCO; with `one_caption` a single one of each image, drawn by the image's id;
    with `instruction` as answers to a question."""

    name: str
    one_caption: bool = False
    instruction: bool = False

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` captions, grouped by image.

        Raises PreprocessError if the file is not of this form, or without a folder of images.
        """
        refuse_columns(options)
        if not source.is_file():
            raise PreprocessError(
                f"{source} is not a file; name the JSON file of the captions, such as "
                "captions_train2014.json"
            )
        check_data(source)
        data = source.read_bytes()
        files, captions = _parse(data, source)
        folders = image_folders(images_folder(source, options), COCO_FOLDERS)
        if self.one_caption:
            captions = {
                i: [draw_caption(i, found)] if found else [] for i, found in captions.items()
            }
        rows = [
            (image_id, files.get(image_id), *entry)
            for image_id, found in captions.items()
            for entry in found or [(None, None)]
        ]
        identity = f"{xxhash.xxh3_128_hexdigest(data)} one caption: {self.one_caption}"
        return cut_rows(
            rows, options.samples_per_split, source, identity, lambda some: (some, folders, source)
        )

    def read(
        self, payload: tuple[list[_Row], tuple[Path, ...], Path]
    ) -> Iterator[Record | Skipped]:
        """Records of consecutive captions; the key joins the ids of the image and the caption."""
        rows, folders, source = payload
        name, image = None, b""
        for image_id, file_name, caption_id, text in rows:
            try:
                if file_name is None:
                    raise SkipError("caption of an unknown image")
                if caption_id is None:
                    raise SkipError("image without a caption")
                if file_name != name:  # the captions of an image follow one another
                    name, image = None, read_first_image(folders, [file_name])
                    name = file_name
                metadata = {"image_id": image_id, "file_name": file_name}
                words = caption(text)
                yield Record(
                    record_key(f"{image_id}_{caption_id}", metadata),
                    images=(image,),
                    caption=None if self.instruction else words,
                    turns=captioning(words) if self.instruction else (),
                    source=source.stem,
                    metadata=metadata,
                )
            except (SkipError, BadSampleError) as error:
                where = f"{source.name}, image {shown(image_id)}, caption {shown(caption_id)}"
                yield skipped(error, where)


def _parse(data: bytes, source: Path) -> tuple[dict[Any, str], dict[Any, list]]:
    """Files and captions (id, text) by the image's id; captions of unknown images come last."""
    try:
        content = parse_json(data)
    except ValueError as error:
        raise PreprocessError(f"{source} is not JSON: {error}") from None
    files: dict[Any, str] = {}
    for image_id, name in _rows(content, source, "images", ("id", "file_name")):
        if files.setdefault(image_id, name) != name:
            raise PreprocessError(
                f"{source}: image {image_id} is both {files[image_id]} and {name}; give one of "
                "them another id"
            )
    captions: dict[Any, list] = {image_id: [] for image_id in files}
    annotations = ("image_id", "id", "caption")
    for image_id, caption_id, text in _rows(content, source, "annotations", annotations):
        captions.setdefault(image_id, []).append((caption_id, text))
    return files, captions


def _rows(content: Any, source: Path, key: str, fields: tuple[str, ...]) -> Iterator[tuple]:
    """Values of every entry of the list `key`; ids are numbers or texts."""
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise PreprocessError(
            f"{source} does not hold COCO captions: it must be an object with lists of images and "
            "annotations"
        )
    for number, row in enumerate(rows):
        if fault := _fault(row, fields):
            raise PreprocessError(f"{source} does not hold COCO captions: {key}[{number}] {fault}")
        yield tuple(row.get(field) for field in fields)


def _fault(row: Any, fields: tuple[str, ...]) -> str | None:
    """What is wrong with an entry, or None."""
    if not isinstance(row, dict):
        return f"is not an object ({shown(row)})"
    for field in fields:
        value = row.get(field)
        if value is None and field != "caption":  # which is the caption's own fate
            return f"has no {field}"
        if field in ("id", "image_id") and not isinstance(value, int | str):
            return f"has the {field} {shown(value)}, neither a whole number nor a text"
    return None


FORMATS: tuple[Format, ...] = (
    Coco("coco"),
    Coco("coco-one-caption", one_caption=True),
    Coco("coco-instruction", one_caption=True, instruction=True),
)
