"""Shards: tar files of records with an index, and the manifest that makes them a data set.

A shard is a plain ustar archive with modification time 0, so the same records give the same
bytes; webdataset reads it. `<name>.tar.idx` is Energon's index: the byte offset of every sample
and, last, the end of the last sample, as little-endian u64. `manifest.json` is written last, so
a folder without it was never finished.
"""

import hashlib
import json
import os
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_owl2.data.records import BadSampleError, Record
from megatron_owl2.data.tar import (
    BLOCK,
    pack_member,
    padding,
    parse_header,
    split_name,
    unpack_sample,
)

MANIFEST = "manifest.json"
FORMAT = "megatron_owl2 shards 1"
_END = bytes(2 * BLOCK)
_ROW_TYPES = {"name": str, "samples": int, "bytes": int, "tar_sha256": str, "index_sha256": str}


class ShardError(RuntimeError):
    """A data set that is unfinished, damaged or unreadable; the message names the file."""


class ShardWriter:
    """Writes records into `<prefix>-000000.tar`, ... and, leaving `with`, the manifest.

    After an exception inside `with` the manifest is not written. With `manifest=False` the caller
    collects `rows` of several writers and calls write_manifest. Raises FileExistsError if the
    folder already holds a manifest, BadSampleError for a record that cannot be stored (nothing of
    it is written), and ValueError if no record came.
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
        self._shard.add(members)
        if len(self._shard.offsets) == self._samples_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        self.rows.append(self._shard.finish())
        self._shard = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            if self._shard is not None:
                self._shard.discard()
            return
        if self._shard is not None:
            self._finish_shard()
        if self._manifest:
            write_manifest(self.directory, self.rows)


class _ShardFile:
    """One tar file under a temporary name until it is complete."""

    def __init__(self, path: Path):
        self.path = path
        self.offsets: list[int] = []
        self._position = 0
        self._digest = hashlib.sha256()
        self._temporary = _temporary(path)
        self._file = self._temporary.open("wb")

    def add(self, members: list[tuple[str, bytes]]) -> None:
        blocks = b"".join(pack_member(name, data) for name, data in members)
        self.offsets.append(self._position)
        self._put(blocks)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)

    def finish(self) -> dict:
        self.offsets.append(self._position)
        self._put(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        return _write_index(self.path, self.offsets, self._position, self._digest.hexdigest())

    def discard(self) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            self._temporary.unlink()


def index_shard(path: str | os.PathLike) -> dict:
    """Index a tar file written by another tool: writes `<path>.idx`, returns its manifest row.

    Checks the checksum of every header, every size and the end marker. Raises ShardError if the
    file is damaged, cut, or holds extended (PAX, GNU) headers or anything but files.
    """
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256()
    offsets, last_key, position = [], None, 0
    with path.open("rb") as file:
        while True:
            header = file.read(BLOCK)
            digest.update(header)
            if header == bytes(BLOCK):
                break
            try:
                name, length = parse_header(header)
            except BadSampleError as error:
                raise ShardError(f"{path} at byte {position}: {error}") from None
            key, _ = split_name(name)
            if key != last_key:
                offsets.append(position)
                last_key = key
            padded = length + padding(length)
            position += BLOCK + padded
            if position + BLOCK > size:
                raise ShardError(f"{path} is cut inside or right after {name}")
            digest.update(file.read(padded))
        rest = file.read()
        digest.update(rest)
    if rest.strip(b"\0"):
        raise ShardError(f"{path} has data after the end marker at byte {position}")
    if not offsets:
        raise ShardError(f"{path} holds no sample")
    return _write_index(path, [*offsets, position], size, digest.hexdigest())


def write_manifest(directory: str | os.PathLike, rows: list[dict]) -> None:
    """Finish a data set: write `manifest.json` over the shard rows, atomically.

    Raises ValueError if the rows hold no sample.
    """
    if not rows:
        raise ValueError(f"{directory}: a data set needs at least one sample")
    manifest = {
        "format": FORMAT,
        "samples": sum(row["samples"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "fingerprint": _fingerprint(rows),
        "shards": rows,
    }
    write_atomically(Path(directory) / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")


def read_manifest(directory: str | os.PathLike) -> dict:
    """The checked manifest of a data set; raises ShardError if it is missing or inconsistent."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ShardError(
            f"{directory} holds no {MANIFEST}: not a data set, or its writing did not finish; "
            "make it with tools/preprocess_data.py"
        ) from None
    except ValueError as error:
        raise ShardError(f"{path} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ShardError(f"{path} is not of the format {FORMAT!r}")
    rows = manifest.get("shards")
    if not isinstance(rows, list) or not rows or not all(_is_row(row) for row in rows):
        raise ShardError(f"{path}: its shard rows are missing or malformed")
    if manifest.get("fingerprint") != _fingerprint(rows):
        raise ShardError(f"{path}: its shard rows do not match its fingerprint; it was edited")
    return manifest


class Dataset:
    """Random access to the records of a finished data set, with at most `max_open` open files.

    Raises ShardError if the manifest is missing or damaged. Safe to copy into forked workers.
    """

    def __init__(self, directory: str | os.PathLike, max_open: int = 128):
        self.directory = Path(directory)
        manifest = read_manifest(directory)
        self.fingerprint: str = manifest["fingerprint"]
        self.shards: list[dict] = manifest["shards"]
        self.sizes: list[int] = [row["samples"] for row in self.shards]
        self._max_open = max_open
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self, shard_index: int, sample_index: int) -> Record:
        """One record. Raises BadSampleError if this sample is damaged, ShardError if its shard
        differs from the manifest or cannot be read; both name the file."""
        file, offsets = self._handle(shard_index)
        if not 0 <= sample_index < len(offsets) - 1:
            raise IndexError(f"sample {sample_index} of {len(offsets) - 1} in shard {shard_index}")
        start, stop = int(offsets[sample_index]), int(offsets[sample_index + 1])
        path = self._path(shard_index)
        try:
            data = os.pread(file, stop - start, start)
        except OSError as error:
            raise ShardError(f"{path} at byte {start}: {error}") from error
        if len(data) != stop - start:
            raise ShardError(f"{path} ended at byte {start + len(data)}: cut while in use")
        try:
            return Record.from_members(*unpack_sample(data))
        except BadSampleError as error:
            raise BadSampleError(f"{path} at byte {start}: {error}") from None

    def location(self, shard_index: int, sample_index: int) -> tuple[str, int]:
        """The shard's file name and the byte offset of a sample in it."""
        _, offsets = self._handle(shard_index)
        return self.shards[shard_index]["name"], int(offsets[sample_index])

    def close(self) -> None:
        """Close every file; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self):
        with suppress(AttributeError):
            self.close()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}  # descriptors stay in their process

    def _path(self, shard_index: int) -> Path:
        return self.directory / self.shards[shard_index]["name"]

    def _handle(self, shard_index: int) -> tuple[int, np.ndarray]:
        handle = self._open.get(shard_index)
        if handle is not None:
            self._open.move_to_end(shard_index)
            return handle
        row, path = self.shards[shard_index], self._path(shard_index)
        try:
            index = Path(f"{path}.idx").read_bytes()
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"cannot open the shard: {error}") from error
        try:
            offsets = _check_shard(path, row, os.fstat(file).st_size, index)
        except ShardError:
            os.close(file)
            raise
        while len(self._open) >= self._max_open:
            os.close(self._open.popitem(last=False)[1][0])
        self._open[shard_index] = (file, offsets)
        return file, offsets


def _check_shard(path: Path, row: dict, size: int, index: bytes) -> np.ndarray:
    if size != row["bytes"]:
        raise ShardError(
            f"{path} has {size} bytes, its manifest says {row['bytes']}: cut or replaced; "
            "copy or preprocess it again"
        )
    if hashlib.sha256(index).hexdigest() != row["index_sha256"]:
        raise ShardError(f"{path}.idx does not match the manifest; copy or preprocess it again")
    offsets = np.frombuffer(index, dtype="<u8")
    if len(offsets) != row["samples"] + 1 or offsets[-1] > size or (np.diff(offsets) <= 0).any():
        raise ShardError(f"{path}.idx does not hold {row['samples']} samples in order")
    return offsets


def _write_index(path: Path, offsets: list[int], size: int, tar_sha256: str) -> dict:
    index = np.asarray(offsets, dtype="<u8").tobytes()
    write_atomically(Path(f"{path}.idx"), index)
    return {
        "name": path.name,
        "samples": len(offsets) - 1,
        "bytes": size,
        "tar_sha256": tar_sha256,
        "index_sha256": hashlib.sha256(index).hexdigest(),
    }


def _is_row(row) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() == _ROW_TYPES.keys()
        and all(type(row[name]) is kind for name, kind in _ROW_TYPES.items())
        and row["name"] == os.path.basename(row["name"])
        and row["name"].endswith(".tar")
        and row["samples"] > 0
    )


def _fingerprint(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or not at all."""
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
