"""Tables (JSON lines, TSV, CSV, Parquet) of image paths and captions."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.formats.common import tables
from data_prep.formats.common.inputs import (
    CAPTION_COLUMNS,
    SkipError,
    caption,
    images_folder,
    read_image,
    sanitize_name,
    scalars,
)
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import BadSampleError

_Payload = tuple[tables.Piece, tuple[str, str], Path]  # (image, caption) columns, image folder
_IMAGE_COLUMNS = ("image", "image_path", "path", "file_name", "filename", "filepath", "file")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][+-]?\d{1,3})?")


class Table:
    """Rows that name an image file and hold its caption; other columns become metadata."""

    name = "table"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` rows of every file.

        Raises PreprocessError without a folder of images, without a table, or if a table does not
        have the columns.
        """
        images = images_folder(source, options)
        splits = []
        for path in tables.files(source):
            for index, piece in enumerate(tables.cut(path, options.samples_per_split)):
                columns = (
                    tables.find_column(
                        path, piece.columns, options.image_column, _IMAGE_COLUMNS, "--image-column"
                    ),
                    tables.find_column(
                        path,
                        piece.columns,
                        options.caption_column,
                        CAPTION_COLUMNS,
                        "--caption-column",
                    ),
                )
                name = f"{sanitize_name(path.stem)}-{index:05d}"
                identity = f"{piece.identity} {columns}"
                splits.append(InputSplit(name, identity, (piece, columns, images), path))
        return InputPlan(splits)

    def read(self, payload: _Payload) -> Iterator[Record | Skipped]:
        """Records of a piece of a table; the key is the row's number in its table, from 0."""
        piece, columns, images = payload
        for number, row in tables.read(piece):
            where = f"{piece.path.name}, row {number}"
            if isinstance(row, Skipped):
                yield Skipped(row.reason, where)
                continue
            try:
                yield _record(number, row, columns, images, piece.path)
            except (SkipError, BadSampleError) as error:
                yield Skipped(str(error), where)


def _record(number: int, row: dict[str, Any], columns: tuple[str, str], images: Path, path: Path):
    image_column, caption_column = columns
    if row.get(image_column) in (None, ""):
        raise SkipError("row names no image")
    metadata = scalars(row, without=columns)
    if path.suffix in (".csv", ".tsv"):
        metadata = {name: _typed(value) for name, value in metadata.items() if value != ""}
    return Record(
        key=f"{number:012d}",
        caption=caption(row.get(caption_column)),
        image=read_image(images, row[image_column]),
        source=path.stem,
        metadata=metadata,
    )


def _typed(text: str) -> Any:
    """A number if the text is one as JSON writes it (so 007 stays a text), else the text."""
    if not _NUMBER.fullmatch(text):
        return text
    value = json.loads(text)
    return value if math.isfinite(value) else text


FORMATS: tuple[Format, ...] = (Table(),)
