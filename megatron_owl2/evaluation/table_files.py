"""Tables of benchmarks: Parquet, and TSV or CSV with a line of names, as rows by column name.

Images inside them stay the bytes or the base64 text that the file has.
"""

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_owl2.errors import TaskError

_DELIMITERS = {".tsv": "\t", ".csv": ","}
SUFFIXES = {".parquet", *_DELIMITERS}


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table whose kind the file's name says.

    Parquet keeps its types; TSV and CSV hold texts in UTF-8, None where a field is empty. A CSV
    whose names are separated by tabs is a TSV, as TGIF-QA's are. Raises TaskError naming the file
    for content that is no such table.
    """
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    delimiter = _DELIMITERS[path.suffix.lower()]
    names, *lines = read_lines(path, delimiter) or [[]]
    if len(names) == 1 and "\t" in names[0]:
        names, *lines = read_lines(path, "\t")
    if len(set(names)) < len(names):
        raise TaskError(f"{path}: two columns have one name: {', '.join(names)}")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(names):
            raise TaskError(f"{path}: row {number} has {len(line)} fields of {len(names)}")
    return [
        {name: field or None for name, field in zip(names, line, strict=True)} for line in lines
    ]


def read_lines(path: Path, delimiter: str = ",") -> list[list[str]]:
    """All rows of a file of delimited texts, whose quoted fields may hold line ends.

    Raises TaskError for files that cannot be read, are not UTF-8, or have an open quote.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file, _fields_of_any_length():
            return [line for line in csv.reader(file, delimiter=delimiter, strict=True) if line]
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise TaskError(f"{path} cannot be read as a table: {reason}") from None


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
