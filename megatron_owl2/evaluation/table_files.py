"""Tables of benchmarks: Parquet, and TSV or CSV with a line of names, as rows by column name.

Images inside them stay the bytes or the base64 text that the file has.
"""

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_owl2.errors import TaskError

_DELIMITERS = {".tsv": "\t", ".csv": ","}
SUFFIXES = {".parquet", *_DELIMITERS}


def read_table(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of a table whose kind the file's name says.

    Parquet keeps its types; TSV and CSV hold texts in UTF-8, None where a field is empty. A CSV
    whose names are separated by tabs is a TSV, as TGIF-QA's are. Raises TaskError naming the file
    and the place for content that is no such table.
    """
    if path.suffix.lower() == ".parquet":
        return [(f"row {n}", row) for n, row in enumerate(_read_parquet(path), start=1)]
    (_, names), *lines = read_lines(path, _delimiter(path)) or [("", [])]
    if len(set(names)) < len(names):
        raise TaskError(f"{path}: two columns have one name: {', '.join(names)}")
    for place, fields in lines:
        if len(fields) != len(names):
            raise TaskError(f"{path}: {place} has {len(fields)} fields of {len(names)}")
    return [
        (place, {name: field or None for name, field in zip(names, fields, strict=True)})
        for place, fields in lines
    ]


def _delimiter(path: Path) -> str:
    """What separates the names of a table, if it can be read."""
    head = b""
    with suppress(OSError), path.open("rb") as file:
        head = file.readline()
    return "\t" if b"\t" in head and b"," not in head else _DELIMITERS[path.suffix.lower()]


def read_lines(path: Path, delimiter: str = ",") -> list[tuple[str, list[str]]]:
    """(place, fields) of a file of delimited texts, whose quoted fields may hold line ends: a place
    is "line 7", where the row begins.

    Raises TaskError for files that cannot be read, are not UTF-8, or have an open quote.
    """
    rows, before = [], 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file, _fields_of_any_length():
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for fields in reader:
                if fields:
                    rows.append((f"line {before + 1}", fields))
                before = reader.line_num
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise TaskError(f"{path} cannot be read as a table: {error} (line {before + 1})") from None
    except UnicodeDecodeError:
        raise TaskError(
            f"{path} cannot be read as a table: it is not UTF-8 (line {line_not_utf8(path)})"
        ) from None
    return rows


def line_not_utf8(path: Path) -> int:
    """The first line, from 1, that is not UTF-8, of a file that is not."""
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return data.count(b"\n", 0, error.start) + 1
    return 1  # the file has changed since


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Python's limit of 128 KiB lifted, as a field may be an image."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise TaskError("Parquet needs pyarrow: pip install 'megatron-owl2[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            return file.read().to_pylist()
    except OSError as error:
        raise TaskError(
            f"{path} cannot be read: {error.strerror or 'it is not Parquet, or cut or damaged'}"
        ) from None
    except (pa.ArrowException, ValueError):
        raise TaskError(f"{path} cannot be read: it is not Parquet, or cut or damaged") from None
