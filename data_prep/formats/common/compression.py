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

HEAD = 10  # bytes that tell the kind
_ZSTD_SKIPPABLE = tuple(bytes((low, 0x2A, 0x4D, 0x18)) for low in range(0x50, 0x60))
_KINDS = {
    "gzip": (b"\x1f\x8b",),
    "bzip2": tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)),
    "xz": (b"\xfd7zXZ\0",),
    "zstd": (b"\x28\xb5\x2f\xfd", *_ZSTD_SKIPPABLE),
}
_INSTEAD = {
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file with `git lfs pull`",
    b"<!doctype html": "an HTML page, left by a failed download",
    b"<html": "an HTML page, left by a failed download",
    b"pk\3\4": "a zip archive; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"rar!": "a rar archive; unpack it",
    b"par1": "Parquet; name it .parquet for --format table",
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


def why_not_data(head: bytes) -> str | None:
    """Words for a file that came in place of the data, by its first bytes, or None."""
    head = head[:200].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((words for start, words in _INSTEAD.items() if head.startswith(start)), None)


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
    largest = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as --long=31 writes it
    return zstandard.open(path, dctx=largest)
