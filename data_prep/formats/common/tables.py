"""Tables in JSON lines, TSV, CSV or Parquet: cut into pieces first, read piece by piece.

Memory does not grow with the table. Text is UTF-8, with or without a byte order mark; a byte that
is not stays visible as a lone surrogate, which no caption may hold. TSV knows no quotes (published
captions are full of single ones); CSV does, with newlines inside, and its lines may end with a
carriage return.
"""

import csv
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_prep.corpus_files import UnreadFile, find_files, why_unread
from data_prep.formats.common import parquet
from data_prep.formats.common.compression import compression_of_file, how_to_unpack
from data_prep.formats.common.encodings import check_text
from data_prep.formats.common.inputs import sanitize_name
from data_prep.formats.common.piece import Piece, check_names
from data_prep.splits import Skipped
from megatron_owl2.errors import PreprocessError
from megatron_owl2.utils.json_text import parse_json

KINDS = (".csv", ".jsonl", ".parquet", ".tsv")

_BOM = b"\xef\xbb\xbf"
_READ_BYTES = 1 << 24
_HEAD_LINES = 100  # of JSON lines, to know the columns
_SEPARATORS = {";": "semicolon", "\t": "tab", "|": "bar", ",": "comma"}
_EMPTY = "empty line"
_END = "\x1e end of the table \x1e"

csv.field_size_limit(1 << 24)


def kind_of(path: Path) -> str:
    """Ending of a table's name in small letters."""
    return path.suffix.lower()


def files(
    source: Path,
    output: Path | None,
    kinds: Sequence[str] = KINDS,
    companions: Collection[str] = (),
) -> tuple[list[Path], list[UnreadFile]]:
    """Paths of the table `source`, or of the tables of one kind in the folder and below, but not in
    `output`, and the files that are none; `companions` are endings of files that need no mention.

    Raises PreprocessError if there is none, or more than one kind.
    """
    wanted = ", ".join(kinds)
    if source.is_file():
        if kind := compression_of_file(source):
            raise PreprocessError(how_to_unpack(source, kind))
        if kind_of(source) not in kinds:
            raise PreprocessError(f"{source} is not a table; its name must end in {wanted}")
        return [source], []
    if not source.is_dir():
        raise PreprocessError(f"{source} is neither a file nor a folder")
    found, unread = find_files(source, output).select(
        lambda path: kind_of(path) in kinds, lambda path: kind_of(path) in companions
    )
    several = sorted({kind_of(path) for path in found})
    if not found:
        raise PreprocessError(f"{source} holds no table ({wanted}){why_unread(unread)}")
    if len(several) > 1:
        raise PreprocessError(f"{source} holds tables of several kinds ({', '.join(several)})")
    return found, unread


def name_in(source: Path, path: Path) -> str:
    """Name of a file among those of `source`, without its ending and as splits are named."""
    inner = path.relative_to(source) if source.is_dir() else Path(path.name)
    return sanitize_name(str(inner.with_suffix("")))


def cut(path: Path, rows: int) -> list[Piece]:
    """Pieces of a table of `rows` rows.

    Text is read once for this, Parquet only its footer. Raises PreprocessError if the file is not
    such a table.
    """
    if kind_of(path) == ".parquet":
        return parquet.cut(path, rows)
    check_text(path)
    with path.open("rb") as file, _csv_errors(path):
        columns, offset = _header(path, file)
        digest = xxhash.xxh3_128()
        file.seek(0)
        digest.update(file.read(offset))
        cutter = _cut_csv if kind_of(path) == ".csv" else cut_lines
        starts, count = cutter(file, rows, digest)
    identity = digest.hexdigest()
    return [
        Piece(path, columns, i * rows, min(rows, count - i * rows), start, f"{identity} {i * rows}")
        for i, start in enumerate(starts)
    ]


def read(piece: Piece) -> Iterator[tuple[int, dict[str, Any] | Skipped]]:
    """Rows of a piece, with their numbers from 0 in the table; CSV and TSV give texts."""
    rows = parquet.read if kind_of(piece.path) == ".parquet" else _text_rows
    yield from enumerate(rows(piece), piece.first)


def find_column(
    source: Path, columns: Sequence[str], wanted: str | None, usual: Sequence[str], option: str
) -> str:
    """Column `wanted`, or else the first of the usual names, whatever its case.

    Raises PreprocessError naming the columns and the option if there is none.
    """
    if wanted is not None and wanted in columns:
        return wanted
    lower = {name.strip().lower(): name for name in reversed(columns)}
    found = next((lower[name] for name in usual if name in lower), None)
    if wanted is not None or found is None:
        raise PreprocessError(
            f"{source} has no column {wanted or ' or '.join(usual)}; name one of its columns "
            f"({', '.join(columns)}) with {option}{_other_separator(columns)}"
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


def _other_separator(columns: Sequence[str]) -> str:
    """End of a message about a table whose only column holds what separates others."""
    found = [name for sign, name in _SEPARATORS.items() if len(columns) == 1 and sign in columns[0]]
    return f"; it seems to be separated by {found[0]}s" if found else ""


@contextmanager
def _csv_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise PreprocessError(
            f"{path} is not CSV: {error}; is a quote left open, or is it TSV?"
        ) from None


def _header(path: Path, file: BinaryIO) -> tuple[tuple[str, ...], int]:
    """Names of the columns, and the byte offset of the rows."""
    offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(offset)
    if kind_of(path) == ".jsonl":
        rows = (_json_row(line) for line in islice(file, _HEAD_LINES))
        columns = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
        if not columns:
            raise PreprocessError(
                f"{path}: none of its first lines is a JSON object; write every object into one "
                "line"
            )
        return tuple(columns), offset
    lines = _lines(path, file)
    columns = tuple(next(_values(path, lines), ()))
    if not any(columns):
        raise PreprocessError(f"{path}: the first line is empty; it must name the columns")
    if any("\n" in name or "\r" in name for name in columns):
        raise csv.Error("a name of a column has a line end")
    check_names(path, columns)
    return columns, offset + lines.bytes


def _cut_csv(file: BinaryIO, rows: int, digest) -> tuple[list[int], int]:
    start, count = file.tell(), 0
    starts, lines = [start], _AnyLines(file, digest)
    last: list[str] = []
    for row in csv.reader(chain(lines, [_END])):  # which an open quote would swallow
        last, count = row, count + 1
        if count % rows == 0:
            starts.append(start + lines.bytes)
    if last != [_END]:
        raise csv.Error(f"the quotes of row {count} do not end")
    count -= 1
    return starts[: -(-count // rows)], count


class _Lines:
    """Lines as texts, counting the bytes that were read."""

    def __init__(self, file: BinaryIO, digest=None):
        self.bytes = 0
        self._file = file
        self._digest = digest

    def __iter__(self) -> Iterator[str]:
        for line in self._split():
            self.bytes += len(line)
            if self._digest is not None:
                self._digest.update(line)
            yield line.decode(errors="surrogateescape")

    def _split(self) -> Iterator[bytes]:
        """Lines of the file with their ends."""
        return iter(self._file.readline, b"")


class _AnyLines(_Lines):
    """Lines that end with a line feed, a carriage return, or both."""

    def _split(self) -> Iterator[bytes]:
        rest = b""
        while block := self._file.read(_READ_BYTES):
            *lines, rest = (rest + block).splitlines(keepends=True)
            yield from lines  # what follows the last one may be its line feed
        yield from rest.splitlines(keepends=True)


def _lines(path: Path, file: BinaryIO) -> _Lines:
    return _AnyLines(file) if kind_of(path) == ".csv" else _Lines(file)


def _values(path: Path, lines: _Lines) -> Iterator[list[str]]:
    return csv.reader(lines) if kind_of(path) == ".csv" else map(_tsv_values, lines)


def _text_rows(piece: Piece) -> Iterator[dict[str, Any] | Skipped]:
    with piece.path.open("rb") as file, _csv_errors(piece.path):
        file.seek(piece.offset)
        if kind_of(piece.path) == ".jsonl":
            yield from map(_json_row, islice(file, piece.rows))
            return
        for values in islice(_values(piece.path, _lines(piece.path, file)), piece.rows):
            if len(values) == len(piece.columns):
                yield dict(zip(piece.columns, values, strict=True))
            elif values in ([], [""]):
                yield Skipped(_EMPTY, "")
            else:
                met = f"{len(values)}, not {len(piece.columns)}"
                yield Skipped("row has another number of columns", met)


def _tsv_values(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t")


def _json_row(line: bytes) -> dict[str, Any] | Skipped:
    if not line.strip():
        return Skipped(_EMPTY, "")
    try:
        row = parse_json(line.decode(errors="surrogateescape"))
    except ValueError:
        row = None
    return row if isinstance(row, dict) else Skipped("row is not a JSON object", "")
