"""Tables in JSON lines, TSV, CSV or Parquet: cut into pieces first, read piece by piece.

Memory does not grow with the table. Text is UTF-8, with or without a byte order mark; a byte that
is not stays visible as a lone surrogate, which no caption may hold. TSV knows no quotes (published
captions are full of single ones); CSV does, with newlines inside, and its lines may end with a
carriage return.
"""

import codecs
import csv
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_prep.corpus_files import UnreadFile, find_files, why_unread
from data_prep.formats.common.compression import compression_of_file, how_to_unpack, why_not_data
from data_prep.formats.common.inputs import sanitize_name
from data_prep.splits import Skipped
from megatron_owl2.errors import PreprocessError
from megatron_owl2.utils.json_text import parse_json

KINDS = (".csv", ".jsonl", ".parquet", ".tsv")

_BOM = b"\xef\xbb\xbf"
_READ_BYTES = 1 << 24
_PARQUET_ROWS = 128  # read at once; a row may hold an image
_HEAD_LINES = 100  # of JSON lines, to know the columns
_HEAD_BYTES = 1 << 16  # of any text, to know its encoding
_SEPARATORS = {";": "semicolon", "\t": "tab", "|": "bar", ",": "comma"}
_EMPTY = "empty line"
_END = "\x1e end of the table \x1e"

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


def _zeros_alternate(head: bytes) -> bool:
    """Whether a text without a byte order mark is in UTF-16 or UTF-32, of mostly Latin letters."""
    places = [head[first::4] for first in range(4)]
    shares = [place.count(0) / max(1, len(place)) for place in places]
    return max(shares) > 0.5 and min(shares) < 0.1


def kind_of(path: Path) -> str:
    """Ending of a table's name in small letters."""
    return path.suffix.lower()


def files(
    source: Path, kinds: Sequence[str] = KINDS, companions: Collection[str] = ()
) -> tuple[list[Path], list[UnreadFile]]:
    """Paths of the table `source`, or of the tables of one kind in the folder and below, and the
    files that are none; `companions` are endings of files that need no mention.

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
    found, unread = find_files(source).select(
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


def check_text(path: Path) -> None:
    """Check that a file is text in UTF-8 and not compressed; raises PreprocessError."""
    if kind := compression_of_file(path):
        raise PreprocessError(how_to_unpack(path, kind))
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head.strip():
        raise PreprocessError(f"{path} is empty")
    if reason := why_not_data(head):
        raise PreprocessError(f"{path} is {reason}")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _zeros_alternate(head):
        raise PreprocessError(f"{path} is text in UTF-16 or UTF-32; save it in UTF-8")
    name = kind_of(path)
    if name != ".csv" and b"\r" in head and b"\n" not in head:
        raise PreprocessError(f"{path}: lines end with a carriage return; save it with line feeds")
    if name == ".jsonl" and head.removeprefix(_BOM).lstrip().startswith(b"["):
        raise PreprocessError(
            f"{path} is a JSON list, not JSON lines; write each of its objects into a line"
        )


def cut(path: Path, rows: int) -> list[Piece]:
    """Pieces of a table of `rows` rows.

    Text is read once for this, Parquet only its footer. Raises PreprocessError if the file is not
    such a table.
    """
    if kind_of(path) == ".parquet":
        return _cut_parquet(path, rows)
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
    rows = _parquet_rows if kind_of(piece.path) == ".parquet" else _text_rows
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
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise PreprocessError(f"{path} is not Parquet, or cut or damaged") from None
    except _arrow_errors():
        raise PreprocessError(f"{path} is not Parquet, or cut or damaged") from None


def _arrow_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return (pyarrow.ArrowException, ValueError, NotImplementedError, UnicodeDecodeError)


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
        return tuple(columns), offset
    lines = _lines(path, file)
    columns = tuple(next(_values(path, lines), ()))
    if any("\n" in name or "\r" in name for name in columns):
        raise csv.Error("a name of a column has a line end")
    if twice := sorted(name for name, count in Counter(columns).items() if count > 1):
        raise PreprocessError(f"{path} has the column {twice[0]!r} twice; rename one of them")
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
                yield Skipped("row has another number of columns", "")


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


def _cut_parquet(path: Path, rows: int) -> list[Piece]:
    with open_parquet(path) as file:
        count, columns = file.metadata.num_rows, tuple(_readable(file))
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
        batches = file.iter_batches(
            _PARQUET_ROWS, row_groups=groups, columns=_readable(file), use_threads=False
        )
        rows = (row for batch in _from(batches, skip) for row in batch.to_pylist())
        try:
            yield from islice(rows, piece.rows)
        except OSError as error:
            if error.errno is not None:  # of the disk
                raise
            raise PreprocessError(f"{piece.path} is damaged") from None
        except _arrow_errors():
            raise PreprocessError(f"{piece.path} is damaged") from None


def holds_images(path: Path, column: str) -> bool:
    """Whether a column of a Parquet file holds images: bytes, or structs with a field `bytes`."""
    if kind_of(path) != ".parquet":
        return False
    import pyarrow.types as types

    with open_parquet(path) as file:
        kind = file.schema_arrow.field(column).type
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind)


def _readable(file) -> list[str]:
    """Columns of a Parquet file but those of times, of which Python cannot hold all."""
    import pyarrow.types as types

    return [field.name for field in file.schema_arrow if not types.is_temporal(field.type)]


def _from(batches, skip: int) -> Iterator:
    """Batches without the first `skip` rows."""
    for batch in batches:
        if skip < batch.num_rows:
            yield batch.slice(skip)
        skip = max(0, skip - batch.num_rows)
