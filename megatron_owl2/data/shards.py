"""Shards: tar files of samples, each with an index and with checksums.

A shard is a plain ustar archive with modification time 0, so the same records give the same
bytes; webdataset and Energon read it. `<name>.tar.idx` is Energon's index: the byte offset of
every sample and, last, the end of the last sample, as little-endian u64. `<name>.tar.sums` holds
the XXH3-64 of every sample's bytes, headers included, as little-endian u64.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest as checksum

from megatron_owl2.data.manifest import (
    MANIFEST,
    ShardError,
    temporary_name,
    write_atomically,
    write_manifest,
)
from megatron_owl2.data.records import BadSampleError, Record, are_usable
from megatron_owl2.data.tar import BLOCK, END, members, pack_member, padding, split_name

INDEX, SUMS = ".idx", ".sums"


class ShardWriter:
    """Writes records into `<prefix>-000000.tar`, ... and, leaving `with`, the manifest.

    After an exception inside `with` the manifest is not written. With `manifest=False` the caller
    collects `rows` of several writers and calls write_manifest. Raises FileExistsError if the
    folder already holds a manifest, BadSampleError for a record that cannot be stored, such as
    one whose key the shard already holds (nothing of it is written), and ValueError if no record
    came.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        samples_per_shard: int = 10_000,
        prefix: str = "shard",
        manifest: bool = True,
    ):
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be positive")
        self.directory = Path(directory)
        self.rows: list[dict] = []
        self._samples_per_shard = samples_per_shard
        self._prefix = prefix
        self._manifest = manifest
        self._shard: _ShardFile | None = None
        if (self.directory / MANIFEST).exists():
            raise FileExistsError(
                f"{self.directory} already holds a finished data set; choose another folder"
            )
        self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, record: Record) -> None:
        """Append one record, in a new shard if the current one is full."""
        parts = record.to_members()
        if self._shard is None:
            name = f"{self._prefix}-{len(self.rows):06d}.tar"
            self._shard = _ShardFile(self.directory / name)
        self._shard.add(record.key, parts)
        if len(self._shard.offsets) == self._samples_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        self.rows.append(self._shard.finish())
        self._shard = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None and self._shard is not None:
                self._finish_shard()
        finally:
            if self._shard is not None:
                self._shard.discard()
        if kind is None and self._manifest:
            write_manifest(self.directory, self.rows)


class _ShardFile:
    """One tar file under a temporary name until it is complete."""

    def __init__(self, path: Path):
        self.path = path
        self.offsets: list[int] = []
        self._sums: list[int] = []
        self._keys: set[str] = set()
        self._position = 0
        self._temporary = temporary_name(path)
        self._file = self._temporary.open("wb")

    def add(self, key: str, parts: list[tuple[str, bytes]]) -> None:
        if key in self._keys:
            raise BadSampleError(f"key {key!r} is already in {self.path.name}")
        blocks = b"".join([pack_member(name, data) for name, data in parts])
        self._file.write(blocks)
        self._keys.add(key)
        self.offsets.append(self._position)
        self._sums.append(checksum(blocks))
        self._position += len(blocks)

    def finish(self) -> dict:
        self._file.write(END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        size = self._position + len(END)
        return _write_sidecars(self.path, [*self.offsets, self._position], self._sums, size)

    def discard(self) -> None:
        with suppress(OSError):  # a full disk fails again when the buffer is flushed
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def index_shard(path: str | os.PathLike) -> dict:
    """Index a tar file written by another tool: writes `.idx` and `.sums`, returns its row.

    A sample is a run of files with one key and different extensions. Checks the checksum of every
    header, every size and the end marker. Raises ShardError if the file is damaged or cut, holds a
    file that belongs to no sample, or if most samples are not of parts that training can use.
    """
    path = Path(path)
    offsets: list[int] = []
    sums: list[int] = []
    last_key, extensions, position, usable = None, set(), 0, 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        window = _Window(file.fileno())
        try:
            for start, name, data, length in members(window.read, 0, size):
                key, extension = split_name(name)
                if key in ("", "/") or not extension or key.endswith("/"):
                    raise BadSampleError(f"{name!r} belongs to no sample; remove it")
                if key != last_key or extension in extensions:
                    if offsets:
                        sums.append(checksum(window.read(offsets[-1], start)))
                        usable += are_usable(extensions)
                    offsets.append(window.keep(start))
                    last_key, extensions = key, set()
                extensions.add(extension)
                position = data + length + padding(length)
            if offsets:
                sums.append(checksum(window.read(offsets[-1], position)))
                usable += are_usable(extensions)
        except BadSampleError as error:
            raise ShardError(f"{path} behind byte {position}: {error}") from None
        if not offsets:
            raise ShardError(f"{path} holds no sample")
        if 2 * usable < len(offsets):
            raise ShardError(
                f"{path}: {len(offsets) - usable} of {len(offsets)} samples are not an image with "
                ".txt or .json; the files of a sample must have one name and lie together"
            )
        _check_end(path, window, position, size)
    return _write_sidecars(path, [*offsets, position], sums, size)


class _Window:
    """Reads a file forwards in large blocks; what lies before `keep` is not asked for again."""

    _BLOCK = 2**18  # what is read stays in the processor's cache until its checksum is taken

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._memory = bytearray(self._BLOCK)
        self._start = self._stop = self._kept = 0

    def keep(self, start: int) -> int:
        self._kept = start
        return start

    def read(self, start: int, stop: int) -> memoryview:
        """The bytes from start to stop, fewer at the end of the file; valid until the next call."""
        if stop > self._stop:
            needed = stop - self._kept
            if needed > len(self._memory):
                self._memory = bytearray(2 * needed)
            self._start = self._stop = self._kept
            view = memoryview(self._memory)
            while count := os.preadv(
                self._descriptor, [view[self._stop - self._start :]], self._stop
            ):
                self._stop += count
                if self._stop >= stop:
                    break
        return memoryview(self._memory)[start - self._start : min(stop, self._stop) - self._start]


def _check_end(path: Path, window: _Window, position: int, size: int) -> None:
    """The end marker is the only proof that a tar was not cut between two samples."""
    if size - position < BLOCK:
        raise ShardError(f"{path} is cut: it has no end marker after byte {position}")
    while position < size:
        data = bytes(window.read(window.keep(position), min(size, position + 2**20)))
        if not data or data.strip(b"\0"):
            raise ShardError(f"{path} has data after the end marker at byte {position}")
        position += len(data)


def load_index(path: str, row: dict, index: bytes, sums: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Offsets, u64 [samples + 1], and checksums, u64 [samples], of a shard from its sidecars.

    Raises ShardError naming `path` if they are not those of the manifest's row.
    """
    for data, suffix, digest in (
        (index, INDEX, row["index_sha256"]),
        (sums, SUMS, row["sums_sha256"]),
    ):
        if hashlib.sha256(data).hexdigest() != digest:
            raise ShardError(
                f"{path}{suffix} does not match the manifest; copy or preprocess the shard again"
            )
    offsets = np.frombuffer(index, dtype="<u8")
    if (
        len(offsets) != row["samples"] + 1
        or len(sums) != 8 * row["samples"]
        or offsets[-1] > row["bytes"]
        or (offsets[1:] <= offsets[:-1]).any()
    ):
        raise ShardError(f"{path}{INDEX} does not hold {row['samples']} samples in order")
    return offsets, np.frombuffer(sums, dtype="<u8")


def _write_sidecars(path: Path, offsets: list[int], sums: list[int], size: int) -> dict:
    row = {"name": path.name, "samples": len(sums), "bytes": size}
    for suffix, values, digest in (
        (INDEX, offsets, "index_sha256"),
        (SUMS, sums, "sums_sha256"),
    ):
        data = np.asarray(values, dtype="<u8").tobytes()
        write_atomically(Path(f"{path}{suffix}"), data)
        row[digest] = hashlib.sha256(data).hexdigest()
    return row
