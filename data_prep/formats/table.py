"""Reads tables (JSON lines, TSV, CSV, Parquet) that name a picture by its path, with a caption."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.formats import tables
from data_prep.formats.inputs import (
    CAPTION_COLUMNS,
    SkipError,
    caption,
    images_folder,
    picture,
    scalars,
    split_name,
)
from data_prep.splits import InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import BadSampleError

_IMAGE_COLUMNS = ("image", "image_path", "path", "file_name", "filename", "filepath", "file")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][+-]?\d{1,3})?")


def plan(source: Path, options: ReadOptions) -> list[InputSplit]:
    """One part for every `options.samples_per_part` rows of the file, or of each in the folder.

    Raises PreprocessError without a folder of pictures, without a table, or if a table does not
    have the columns.
    """
    images = images_folder(source, options)
    parts = []
    for path in tables.files(source):
        for index, piece in enumerate(tables.cut(path, options.samples_per_part)):
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
            name = f"{split_name(path.stem)}-{index:05d}"
            identity = f"{piece.identity} {columns}"
            parts.append(InputSplit(name, identity, (piece, columns, images), path))
    return parts


def read(payload: tuple[tables.Piece, tuple[str, str], Path]) -> Iterator[Record | Skipped]:
    """The records of a piece; the key is the row's number in its table, from 0."""
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
        image=picture(images, row[image_column]),
        source=path.stem,
        metadata=metadata,
    )


def _typed(text: str) -> Any:
    """A number if the text is one as JSON writes it (so 007 stays a text), else the text."""
    if not _NUMBER.fullmatch(text):
        return text
    value = json.loads(text)
    return value if math.isfinite(value) else text
