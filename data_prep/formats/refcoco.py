"""RefCOCO, RefCOCO+ and RefCOCOg in MDETR's JSON: {images: [{id, file_name, width, height,
caption}], annotations: [{image_id, bbox}]}, an entry of images for every expression.

The files of the data sets' authors, `refs(unc).p`, are pickles, which could run any program and are
not read. MDETR publishes the same expressions as `finetune_refcoco_train.json` and so on
(`mdetr_annotations.tar.gz`, Zenodo record 4729015). `--images` is COCO's train2014, or a folder
that holds it.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.formats.common.annotation_files import published_file
from data_prep.formats.common.coco_images import COCO_FOLDERS
from data_prep.formats.common.encodings import check_data
from data_prep.formats.common.inputs import (
    SkipError,
    cut_rows,
    image_folders,
    images_folder,
    read_first_image,
    record_key,
    refuse_columns,
    shown,
    skipped,
)
from data_prep.formats.common.regions import Region, one_of_each_phrase, questions, read_region
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import BadSampleError, PreprocessError
from megatron_owl2.utils.json_text import parse_json

_FILE = "finetune_refcoco_train.json"
_TURNS = 4  # of a sample, at most; an image has about seven expressions
_PICKLES = (b"\x80", b"(dp", b"(lp")  # beginnings of protocol 2 and later, and of 0
_Expression = tuple[Any, Any, tuple[Any, Any], list]  # id, phrase, (width, height), boxes
_Image = tuple[str, list[_Expression]]  # file, expressions


class RefCoco:
    """Expressions that refer to an object in an image, with its box."""

    name = "refcoco"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for the images of about `options.samples_per_split` samples.

        `source` is the file, or the folder that holds RefCOCO's. Raises PreprocessError if the file
        is not of this form, or without a folder of images.
        """
        refuse_columns(options)
        path = published_file(source, _FILE)
        if check_data(path).startswith(_PICKLES):
            raise PreprocessError(
                f"{path} is a pickle, which could run any program and is not read; take "
                f"{_FILE} of MDETR's annotations (Zenodo record 4729015)"
            )
        data = path.read_bytes()
        folders = image_folders(images_folder(path, options), COCO_FOLDERS)
        groups = _parse(data, path)
        digest = hashlib.sha256(data).hexdigest()
        size = max(1, options.samples_per_split // 2)
        return cut_rows(groups, size, path, digest, lambda some: (some, folders, path))

    def read(
        self, payload: tuple[list[_Image], tuple[Path, ...], Path]
    ) -> Iterator[Record | Skipped]:
        """Records of consecutive images, of up to four expressions each; the key joins the name of
        the image's file and the sample's number.

        An expression that cannot be used is one Skipped. Of expressions with the same phrase one is
        asked about; `metadata["other_regions"]` of an image's first sample counts the others.
        """
        groups, folders, source = payload
        for file_name, expressions in groups:
            regions: list[Region] = []
            for expression in expressions:
                try:
                    regions.append(_region(file_name, expression))
                except SkipError as error:
                    name = shown(expression[0])
                    yield skipped(error, f"{source.name}, image {file_name}, expression {name}")
            chosen = one_of_each_phrase(regions)
            others = len(regions) - len(chosen)
            for number, start in enumerate(range(0, len(chosen), _TURNS)):
                metadata: dict[str, Any] = {
                    "file_name": file_name,
                    "other_regions": 0 if number else others,  # once, so that they add up
                }
                try:
                    yield Record(
                        record_key(f"{Path(file_name).stem}_{number}", metadata),
                        images=(read_first_image(folders, [file_name]),),
                        turns=questions(chosen[start : start + _TURNS]),
                        source=source.stem,
                        metadata=metadata,
                    )
                except (SkipError, BadSampleError) as error:
                    yield skipped(error, f"{source.name}, image {file_name}, sample {number}")


def _region(file_name: str, expression: _Expression) -> Region:
    name, phrase, size, boxes = expression
    if len(boxes) != 1 or not isinstance(boxes[0], list):
        raise SkipError("expression without one box", f"{len(boxes)} boxes")
    return read_region(f"{file_name} {name}", phrase, boxes[0], size)


def _parse(data: bytes, source: Path) -> list[_Image]:
    """Expressions by their image, in the order of the file."""
    try:
        content = parse_json(data)
    except ValueError as error:
        raise PreprocessError(f"{source} is not JSON: {error}") from None
    boxes: dict[Any, list] = {}
    for row in _rows(content, source, "annotations", "image_id"):
        boxes.setdefault(row["image_id"], []).append(row.get("bbox"))
    groups: dict[str, list[_Expression]] = {}
    for row in _rows(content, source, "images", "id"):
        name = row.get("file_name")
        if not isinstance(name, str):
            raise PreprocessError(f"{source}: the image {shown(row['id'])} has no file_name")
        size = row.get("width"), row.get("height")
        expression = (row["id"], row.get("caption"), size, boxes.pop(row["id"], []))
        groups.setdefault(name, []).append(expression)
    if boxes:
        raise PreprocessError(f"{source}: annotations of unknown images, {shown(list(boxes)[0])}")
    return list(groups.items())


def _rows(content: Any, source: Path, key: str, identifier: str) -> list[dict]:
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise PreprocessError(
            f"{source} does not hold MDETR's annotations: it must be an object with lists of "
            "images and annotations"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get(identifier), str | int):
            raise PreprocessError(f"{source}: {key}[{number}] has no {identifier}")
    return rows


FORMATS: tuple[Format, ...] = (RefCoco(),)
