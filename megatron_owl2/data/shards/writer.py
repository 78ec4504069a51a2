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

from megatron_owl2.data.shards.manifest import MANIFEST, write_manifest
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.shards.tar import END, pack_member
from megatron_owl2.errors import BadSampleError, ShardError
from megatron_owl2.utils.files import temporary_name, write_atomically

INDEX, SUMS = ".idx", ".sums"


class ShardWriter:
    """Writer of records into `<prefix>-000000.tar`, ... and, on leaving `with`, of the manifest.

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
        members = record.to_members()
        if self._shard is None:
            name = f"{self._prefix}-{len(self.rows):06d}.tar"
            self._shard = _ShardFile(self.directory / name)
        self._shard.add(record.key, members)
        if len(self._shard.offsets) == self._samples_per_shard:
            self._finish(self._shard)

    def _finish(self, shard: "_ShardFile") -> None:
        self.rows.append(shard.finish())
        self._shard = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None and self._shard is not None:
                self._finish(self._shard)
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

    def add(self, key: str, members: list[tuple[str, bytes]]) -> None:
        if key in self._keys:
            raise BadSampleError(f"key {key!r} is already in {self.path.name}")
        blocks = b"".join([pack_member(name, data) for name, data in members])
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
        return write_sidecars(self.path, [*self.offsets, self._position], self._sums, size)

    def discard(self) -> None:
        with suppress(OSError):  # a full disk fails again when the buffer is flushed
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_sidecars(path: Path, offsets: list[int], sums: list[int], size: int) -> dict:
    """Write index and checksums of a shard of `size` bytes beside it; returns its manifest row."""
    row = {"name": path.name, "samples": len(sums), "bytes": size}
    for suffix, values, digest in (
        (INDEX, offsets, "index_sha256"),
        (SUMS, sums, "sums_sha256"),
    ):
        data = np.asarray(values, dtype="<u8").tobytes()
        write_atomically(Path(f"{path}{suffix}"), data)
        row[digest] = hashlib.sha256(data).hexdigest()
    return row


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
