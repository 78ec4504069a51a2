"""Parquet files, read piece by piece; their errors without the words of pyarrow."""

import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from data_prep.formats.common.compression import why_not_data
from data_prep.formats.common.piece import Piece, check_names
from megatron_owl2.errors import PreprocessError

_ROWS = 128  # read at once; a row may hold an image


def import_pyarrow():
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
    module = import_pyarrow()
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
    check_names(path, columns)
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
        rows = (row for batch in _from(batches, skip) for row in _rows(batch))
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
    if types.is_dictionary(kind):
        kind = kind.value_type
    of_bytes = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(is_kind(kind) for is_kind in (*of_bytes, types.is_fixed_size_binary))


def _readable(file) -> list[str]:
    """Columns of a Parquet file but those of times, of which Python cannot hold all."""
    return [field.name for field in file.schema_arrow if not _holds_times(field.type)]


def _holds_times(kind) -> bool:
    """Whether a type is one of times, or has such a one inside."""
    import pyarrow.types as types

    inner = (kind.field(i).type for i in range(kind.num_fields))
    return types.is_temporal(kind) or any(map(_holds_times, inner))


def _rows(batch) -> list[dict[str, Any]]:
    """Rows of a batch; bytes of texts that are not UTF-8 become lone surrogates."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = zip(batch.schema.names, map(_values, batch.columns), strict=True)
        table = dict(columns)
        return [{name: table[name][i] for name in table} for i in range(batch.num_rows)]


def _values(column) -> list:
    import pyarrow.types as types

    kind = column.type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        return column.to_pylist()
    values = column.cast("binary" if types.is_string(kind) else "large_binary").to_pylist()
    return [None if v is None else v.decode(errors="surrogateescape") for v in values]


def _from(batches, skip: int) -> Iterator:
    """Batches without the first `skip` rows."""
    for batch in batches:
        if skip < batch.num_rows:
            yield batch.slice(skip)
        skip = max(0, skip - batch.num_rows)
