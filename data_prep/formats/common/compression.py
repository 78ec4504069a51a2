"""Compressed files, known by their first bytes whatever their names are."""

import bz2
import gzip
import lzma
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import zstandard

from megatron_owl2.errors import PreprocessError

HEAD = 6  # bytes that tell the kind
_ZSTD_SKIPPABLE = tuple(bytes((low, 0x2A, 0x4D, 0x18)) for low in range(0x50, 0x60))
_KINDS = {
    "gzip": (b"\x1f\x8b",),
    "bzip2": (b"BZh",),
    "xz": (b"\xfd7zXZ\0",),
    "zstd": (b"\x28\xb5\x2f\xfd", *_ZSTD_SKIPPABLE),
}
_UNPACK = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd"}
_IN_MEMORY = 1 << 24  # bytes of an unpacked file; more goes to the disk of TMPDIR
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def compression_of(head: bytes) -> str | None:
    """Kind of a compressed file by its first HEAD bytes: gzip, bzip2, xz, zstd or None."""
    return next((kind for kind, starts in _KINDS.items() if head.startswith(starts)), None)


def compression_of_file(path: Path) -> str | None:
    """Kind of a file by its first bytes, or None if it is not compressed."""
    with path.open("rb") as file:
        return compression_of(file.read(HEAD))


def how_to_unpack(path: Path, kind: str) -> str:
    """Remedy for a file that must not be compressed."""
    return f"{path} is compressed with {kind}; unpack it first ({_UNPACK[kind]})"


@contextmanager
def open_unpacked(path: Path) -> Iterator[tuple[BinaryIO | IO[bytes], str | None]]:
    """A file, unpacked if it is compressed, and why not all of it could be unpacked (or None).

    What was unpacked before the damage can be read. It lies in a temporary file, since readers
    move back and forth. Raises PreprocessError if that does not fit on its disk.
    """
    kind = compression_of_file(path)
    if kind is None:
        with path.open("rb", buffering=0) as file:
            yield file, None
        return
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as unpacked:
        yield unpacked, _unpack(path, kind, unpacked)


def _unpack(path: Path, kind: str, unpacked: IO[bytes]) -> str | None:
    """Unpacking as far as the data allow; returns why not all of them did."""
    with _decompressor(path, kind) as packed:
        while True:
            try:
                block = packed.read(1 << 20)
            except (*_DAMAGE, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of the disk, not of the data
                return f"its {kind} data are cut or damaged"
            if not block:
                return None
            try:
                unpacked.write(block)
            except OSError as error:
                raise PreprocessError(
                    f"{path} cannot be unpacked in {tempfile.gettempdir()}: {error.strerror}; set "
                    "TMPDIR to a folder with more room, or unpack it yourself"
                ) from None


def _decompressor(path: Path, kind: str) -> Any:
    match kind:
        case "gzip":
            return gzip.open(path)
        case "bzip2":
            return bz2.open(path)
        case "xz":
            return lzma.open(path)
    return zstandard.open(path)
