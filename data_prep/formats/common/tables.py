"""Tables in JSON lines, TSV, CSV or Parquet: cut into pieces first, read piece by piece.

Memory does not grow with the table. Text is UTF-8, with or without a byte order mark; a byte that
is not stays visible as a lone surrogate, which no caption may hold. TSV knows no quotes (published
captions are full of single ones); CSV does, with newlines inside.
"""

import csv
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_prep.splits import Skipped
from megatron_owl2.errors import PreprocessError

KINDS = (".csv", ".jsonl", ".parquet", ".tsv")

_BOM = b"\xef\xbb\xbf"
_READ_BYTES = 1 << 24
_PARQUET_ROWS = 128  # read at once; a row may hold an image
_HEAD_LINES = 100  # of JSON lines, to know the columns

csv.field_size_limit(1 << 24)


@dataclass(frozen=True)
class Piece:
    """`rows` rows of a table from row number `first` on, which begins at byte `offset` (text)."""

    path: Path
    columns: tuple[str, ...]
    first: int
    rows: int
    offset: int
    identity: str


def files(source: Path) -> list[Path]:
    """Paths of the table `source`, or of the tables of one kind in the folder `source`, by name.

    Raises PreprocessError if there is none, or more than one kind.
    """
    if source.is_file():
        if source.suffix not in KINDS:
            raise PreprocessError(f"{source} is not a table; its name must end in {_names()}")
        return [source]
    if not source.is_dir():
        raise PreprocessError(f"{source} is neither a file nor a folder")
    found = sorted(path for path in source.iterdir() if path.suffix in KINDS and path.is_file())
    kinds = sorted({path.suffix for path in found})
    if not found:
        raise PreprocessError(f"{source} holds no table ({_names()})")
    if len(kinds) > 1:
        raise PreprocessError(f"{source} holds tables of several kinds ({', '.join(kinds)})")
    return found


def cut(path: Path, rows: int) -> list[Piece]:
    """Pieces of a table of `rows` rows.

    Text is read once for this, Parquet only its footer. Raises PreprocessError if the file is not
    such a table.
    """
    if path.suffix == ".parquet":
        return _cut_parquet(path, rows)
    with path.open("rb") as file:
        columns, offset = _header(path, file)
        digest = xxhash.xxh3_128()
        file.seek(0)
        digest.update(file.read(offset))
        cutter = _cut_csv if path.suffix == ".csv" else cut_lines
        try:
            starts, count = cutter(file, rows, digest)
        except csv.Error as error:
            raise PreprocessError(
                f"{path} is not CSV: {error}; is a quote left open, or is it TSV?"
            ) from None
    identity = digest.hexdigest()
    return [
        Piece(path, columns, i * rows, min(rows, count - i * rows), start, f"{identity} {i * rows}")
        for i, start in enumerate(starts)
    ]


def read(piece: Piece) -> Iterator[tuple[int, dict[str, Any] | Skipped]]:
    """Rows of a piece, with their numbers from 0 in the table; CSV and TSV give texts."""
    rows = _parquet_rows if piece.path.suffix == ".parquet" else _text_rows
    yield from enumerate(rows(piece), piece.first)


def find_column(
    source: Path, columns: Sequence[str], wanted: str | None, usual: Sequence[str], option: str
) -> str:
    """Column `wanted`, or else the first of the usual names, whatever its case.

    Raises PreprocessError naming the columns and the option if there is none.
    """
    if wanted is not None and wanted in columns:
        return wanted
    lower = {name.lower(): name for name in reversed(columns)}
    found = next((lower[name] for name in usual if name in lower), None)
    if wanted is not None or found is None:
        raise PreprocessError(
            f"{source} has no column {wanted or ' or '.join(usual)}; name one of its columns "
            f"({', '.join(columns)}) with {option}"
        )
    return found


def cut_lines(file: BinaryIO, rows: int, digest) -> tuple[list[int], int]:
    """Byte offsets of every `rows`-th line from the file's position on, and the number of lines.

    `digest` is updated with all of them.
    """
    start = position = file.tell()
    starts, count, last = [start], 0, b"\n"
    while block := file.read(_READ_BYTES):
        digest.update(block)
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        starts += (position + 1 + ends[rows - 1 - count % rows :: rows]).tolist()
        count += len(ends)
        position += len(block)
        last = block[-1:]
    count += last != b"\n"
    return starts[: -(-count // rows)], count


def parquet():
    """Module pyarrow.parquet; raises PreprocessError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise PreprocessError(
            "Parquet needs pyarrow: pip install 'megatron-owl2[parquet]'"
        ) from None
    return pyarrow.parquet


def open_parquet(path: Path):
    """ParquetFile that reads its column chunks piece by piece; raises PreprocessError."""
    module = parquet()
    try:
        return module.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise PreprocessError(f"{path} is not Parquet: {error}") from None


def _names() -> str:
    return ", ".join(KINDS)


def _header(path: Path, file: BinaryIO) -> tuple[tuple[str, ...], int]:
    """Names of the columns, and the byte offset of the rows."""
    offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(offset)
    if path.suffix == ".jsonl":
        rows = (_json_row(line) for line in islice(file, _HEAD_LINES))
        columns = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
        return tuple(columns), offset
    lines = _Lines(file)
    reader = csv.reader(lines) if path.suffix == ".csv" else map(_tsv_values, lines)
    return tuple(next(reader, ())), offset + lines.bytes


def _cut_csv(file: BinaryIO, rows: int, digest) -> tuple[list[int], int]:
    start, count = file.tell(), 0
    starts, lines = [start], _Lines(file, digest)
    for _ in csv.reader(lines):
        count += 1
        if count % rows == 0:
            starts.append(start + lines.bytes)
    return starts[: -(-count // rows)], count


class _Lines:
    """Lines as texts, counting the bytes that were read."""

    def __init__(self, file: BinaryIO, digest=None):
        self.bytes = 0
        self._file = file
        self._digest = digest

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.bytes += len(line)
            if self._digest is not None:
                self._digest.update(line)
            yield line.decode(errors="surrogateescape")


def _text_rows(piece: Piece) -> Iterator[dict[str, Any] | Skipped]:
    with piece.path.open("rb") as file:
        file.seek(piece.offset)
        if piece.path.suffix == ".jsonl":
            yield from map(_json_row, islice(file, piece.rows))
            return
        lines = _Lines(file)
        table = csv.reader(lines) if piece.path.suffix == ".csv" else map(_tsv_values, lines)
        for values in islice(table, piece.rows):
            if len(values) == len(piece.columns):
                yield dict(zip(piece.columns, values, strict=True))
            else:
                yield Skipped("row has another number of columns", "")


def _tsv_values(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t")


def _json_row(line: bytes) -> dict[str, Any] | Skipped:
    try:
        row = json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else Skipped("row is not a JSON object", "")


def _cut_parquet(path: Path, rows: int) -> list[Piece]:
    with open_parquet(path) as file:
        count, columns = file.metadata.num_rows, tuple(file.schema_arrow.names)
    with path.open("rb") as file:  # the footer tells where everything lies and its statistics
        file.seek(-8, 2)
        (length,) = struct.unpack("<I", file.read(4))
        file.seek(-8 - length, 2)
        identity = f"{path.stat().st_size} bytes, footer {xxhash.xxh3_128_hexdigest(file.read())}"
    return [
        Piece(path, columns, first, min(rows, count - first), 0, f"{identity} {first}")
        for first in range(0, count, rows)
    ]


def _parquet_rows(piece: Piece) -> Iterator[dict[str, Any]]:
    with open_parquet(piece.path) as file:
        first, groups, skip = 0, [], 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < piece.first + piece.rows and piece.first < first + rows:
                if not groups:
                    skip = piece.first - first
                groups.append(group)
            first += rows
        batches = file.iter_batches(_PARQUET_ROWS, row_groups=groups, use_threads=False)
        rows = (row for batch in _from(batches, skip) for row in batch.to_pylist())
        try:
            yield from islice(rows, piece.rows)
        except (OSError, ValueError) as error:
            raise PreprocessError(f"{piece.path} is damaged: {error}") from None


def _from(batches, skip: int) -> Iterator:
    """Batches without the first `skip` rows."""
    for batch in batches:
        if skip < batch.num_rows:
            yield batch.slice(skip)
        skip = max(0, skip - batch.num_rows)
