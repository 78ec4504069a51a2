"""Tables (JSON lines, TSV, CSV, Parquet) of image paths and captions; Parquet may hold images."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.corpus_files import UnreadFile
from data_prep.formats.common import parquet, tables
from data_prep.formats.common.inputs import (
    CAPTION_COLUMNS,
    IMAGE_EXTENSIONS,
    SkipError,
    caption,
    images_folder,
    read_image,
    scalars,
    shown,
    skipped,
)
from data_prep.formats.common.piece import Piece
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import BadSampleError

# Piece, (image, caption) columns, image folder (None: the table holds the images).
_Payload = tuple[Piece, tuple[str, str], Path | None]
_IMAGE_COLUMNS = ("image", "image_path", "path", "file_name", "filename", "filepath", "file")
_IMAGE_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][+-]?\d{1,3})?")


class Table:
    """Rows that name an image file, or hold it, and its caption; other columns become metadata."""

    name = "table"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` rows of every file.

        Raises PreprocessError without a folder of images that are named, without a table, or if a
        table does not have the columns.
        """
        splits = []
        paths, unread = tables.files(source, options.output, companions=_IMAGE_ENDINGS)
        for path in paths:
            if tables.kind_of(path) != ".parquet":
                images_folder(source, options)
            pieces = tables.cut(path, options.samples_per_split)
            if not pieces:
                unread.append(UnreadFile(path, "table without rows"))
                continue
            columns = _columns(path, pieces[0].columns, options)
            images = options.images
            if images is not None or not _holds_images(path, columns[0]):
                images = images_folder(source, options)
            for index, piece in enumerate(pieces):
                name = f"{tables.name_in(source, path)}-{index:05d}"
                identity = f"{piece.identity} {columns}"
                splits.append(InputSplit(name, identity, (piece, columns, images), path))
        return InputPlan(splits, unread)

    def read(self, payload: _Payload) -> Iterator[Record | Skipped]:
        """Records of a piece of a table; the key is the row's number in its table, from 0."""
        piece, columns, images = payload
        for number, row in tables.read(piece):
            where = f"{piece.path.name}, row {number}"
            if isinstance(row, Skipped):
                yield Skipped(row.reason, f"{where}: {row.detail}" if row.detail else where)
                continue
            try:
                yield _record(number, row, columns, images, piece.path)
            except (SkipError, BadSampleError) as error:
                yield skipped(error, where)


def _columns(path: Path, names: Sequence[str], options: ReadOptions) -> tuple[str, str]:
    """Columns of the image and of the caption."""
    find, image, text = tables.find_column, options.image_column, options.caption_column
    return (
        find(path, names, image, _IMAGE_COLUMNS, "--image-column"),
        find(path, names, text, CAPTION_COLUMNS, "--caption-column"),
    )


def _record(
    number: int, row: dict[str, Any], columns: tuple[str, str], images: Path | None, path: Path
) -> Record:
    image_column, caption_column = columns
    image, text = row.get(image_column), row.get(caption_column)
    if isinstance(image, dict):  # as Hugging Face data sets hold images
        image = image.get("bytes") or image.get("path")
    if image in (None, "", b""):
        raise SkipError("row names no image")
    if text is not None and not isinstance(text, str):
        reason = "caption is not a text: name another column with --caption-column"
        raise SkipError(reason, f"{caption_column} is {shown(text)}")
    metadata = scalars(row, without=columns)
    if tables.kind_of(path) in (".csv", ".tsv"):
        metadata = {name: _typed(value) for name, value in metadata.items() if value != ""}
    return Record(
        key=f"{number:012d}",
        caption=caption(text),
        images=(_image(image, images),),
        source=path.stem,
        metadata=metadata,
    )


def _holds_images(path: Path, column: str) -> bool:
    return tables.kind_of(path) == ".parquet" and parquet.holds_images(path, column)


def _image(value: Any, images: Path | None) -> bytes:
    """Bytes of the image in a row: in it, or in the file that it names."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        reason = "image is not one path: name another column with --image-column"
        raise SkipError(reason, shown(value))
    if images is None:
        raise SkipError("row names its image alone: say where it is with --images", shown(value))
    return read_image(images, value)


def _typed(text: str) -> Any:
    """A number if the text is one as JSON writes it (so 007 stays a text), else the text."""
    if not _NUMBER.fullmatch(text):
        return text
    value = json.loads(text)
    return value if math.isfinite(value) else text


FORMATS: tuple[Format, ...] = (Table(),)
