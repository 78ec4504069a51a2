"""Parquet files, read piece by piece; their errors without the words of pyarrow."""

import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from data_prep.formats.common.compression import why_not_data
from data_prep.formats.common.piece import Piece
from megatron_owl2.errors import PreprocessError

_ROWS = 128  # read at once; a row may hold an image


def library():
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
    module = library()
    try:
        return module.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise _not_parquet(path) from None
    except _arrow_errors():
        raise _not_parquet(path) from None


def _not_parquet(path: Path) -> PreprocessError:
    with path.open("rb") as file:
        head = file.read(200)
    reason = None if head.startswith(b"PAR1") else why_not_data(head)
    return PreprocessError(f"{path} is {reason or 'not Parquet, or cut or damaged'}")


def _arrow_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return (pyarrow.ArrowException, ValueError, NotImplementedError, UnicodeDecodeError)


def cut(path: Path, rows: int) -> list[Piece]:
    """Pieces of a file of `rows` rows, by its footer alone; raises PreprocessError."""
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


def read(piece: Piece) -> Iterator[dict[str, Any]]:
    """Rows of a piece; raises PreprocessError if the file is damaged."""
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
            _ROWS, row_groups=groups, columns=_readable(file), use_threads=False
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
