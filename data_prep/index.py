"""Index of tar files that another program wrote: they become a data set without being copied."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from xxhash import xxh3_64_intdigest as checksum

from data_prep.corpus_files import CorpusFiles, UnreadFile, find_files, why_unread
from data_prep.formats.common.compression import HEAD, compression_of, how_to_unpack, why_not_data
from data_prep.formats.common.tars import is_tar
from data_prep.map_shards import check_writable, map_shards
from megatron_owl2.data.shards.manifest import MANIFEST, write_manifest
from megatron_owl2.data.shards.records import why_unusable
from megatron_owl2.data.shards.tar import (
    BLOCK,
    entries,
    is_member,
    padding,
    split_name,
    unpack_sample,
)
from megatron_owl2.data.shards.writer import INDEX, SUMS, write_sidecars
from megatron_owl2.errors import BadSampleError, ShardError

_SIDECARS = (INDEX, SUMS)
_APART = "files of one name that lie apart"
_PREPROCESS = "tools/preprocess_data.py --format webdataset"


@dataclass
class Indexed:
    """Result for a folder: manifest `rows` of its sound shards, the number of their samples that
    training cannot use (`unusable`, by reason), a message for each shard that cannot be indexed
    (`failures`), and the files that are no shards of it (`unread`).
    """

    rows: list[dict] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    unread: list[UnreadFile] = field(default_factory=list)


def index_directory(directory: Path, workers: int = 1) -> Indexed:
    """Index of all tar files of a folder, which makes it a data set.

    Writes `.idx` and `.sums` beside each and, if none of them fails, the manifest. Raises
    ShardError if it is no folder, holds no tar file, is a data set already or may not be written
    to, or if training cannot use most samples.
    """
    if not directory.is_dir():
        raise ShardError(f"{directory} is not a folder; name the folder that holds the tar files")
    if (directory / MANIFEST).exists():
        raise ShardError(
            f"{directory} holds a {MANIFEST} already; check it with tools/check_data.py, or remove "
            "the manifest to index its shards again"
        )
    paths, unread = _find_shards(directory)
    if not paths:
        raise ShardError(f"{directory} holds no .tar file{why_unread(unread)}")
    check_writable(directory)
    sizes = {path: path.stat().st_size for path in paths}
    found = Indexed(unread=unread)
    for _, result in map_shards(_index, sizes, workers, "index"):
        if isinstance(result, str):
            found.failures.append(result)
        else:
            row, unusable = result
            found.rows.append(row)
            found.unusable += unusable
    found.rows.sort(key=lambda row: row["name"])
    found.failures.sort()
    samples, unusable = sum(row["samples"] for row in found.rows), found.unusable.total()
    if 2 * unusable > samples:
        reasons = ", ".join(f"{n} x {reason}" for reason, n in found.unusable.most_common())
        raise ShardError(
            f"{directory}: {unusable} of {samples} samples are no image with .txt or .json that "
            f"training can use ({reasons}); {_PREPROCESS} makes a data set of what can be "
            "used: it puts together files that lie apart, reads names with dots and "
            "--caption-column, and counts the rest by its reason"
        )
    if not found.failures:
        write_manifest(directory, found.rows)
    return found


def _find_shards(directory: Path) -> tuple[list[Path], list[UnreadFile]]:
    """Tar files of a folder, and the files that its manifest cannot name."""
    found = find_files(directory)
    tars = [path for path in found.files if is_tar(path)]
    below = "tar file in a folder below, which needs an index of its own"
    unread = [UnreadFile(path, below) for path in tars if path.parent != directory]
    others = CorpusFiles([path for path in found.files if not is_tar(path)], found.unread)
    unread += others.select(lambda path: False, lambda path: path.suffix in _SIDECARS)[1]
    return [path for path in tars if path.parent == directory], unread


def _index(path: Path) -> tuple[dict, Counter[str]] | str:
    """Result of index_shard, or the message why the file cannot be indexed."""
    try:
        return index_shard(path)
    except ShardError as error:
        return str(error)
    except PermissionError:
        return f"{path} may not be read"


def index_shard(path: str | os.PathLike) -> tuple[dict, Counter[str]]:
    """Index of one tar file of another tool: `.idx` and `.sums` are written beside it.

    Returns its manifest row and the number of samples that training cannot use, by reason.

    A sample is a run of files with one key and different extensions. Checks the checksum of every
    header, every size, the end marker, and that the archive is of whole blocks. What is no member
    of a sample is passed over. Raises ShardError if the file is damaged, cut or compressed.
    """
    path = Path(path)
    offsets: list[int] = []
    sums: list[int] = []
    unusable: Counter[str] = Counter()
    seen: dict[str, set[str]] = {}
    last_key, extensions, position = None, set(), 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if kind := compression_of(os.pread(file.fileno(), HEAD, 0)):
            raise ShardError(
                f"{how_to_unpack(path, kind)}, or make shards of it with {_PREPROCESS}, which "
                "reads it as it is"
            )
        if reason := why_not_data(os.pread(file.fileno(), 200, 0)):
            raise ShardError(f"{path} is {reason}")
        if path.suffix != ".tar":
            raise ShardError(f"{path} is not compressed; rename it to end in .tar")
        if not size:
            raise ShardError(f"{path} is empty; copy it again")
        if size % BLOCK:
            raise ShardError(
                f"{path} has {size} bytes, no multiple of {BLOCK} as tar's always are: it lost "
                "bytes or got more; copy it again"
            )
        window = _Window(file.fileno())

        def finish(stop: int) -> None:
            data = window.read(offsets[-1], stop)
            sums.append(checksum(data))
            key, members = unpack_sample(bytes(data))
            apart = not members.keys() & seen.setdefault(key, set())
            reason = _APART if seen[key] and apart else why_unusable(key, members)
            seen[key] |= members.keys()
            if reason:
                unusable[reason] += 1

        try:
            for start, name, data, length in entries(window.read, 0, size):
                if name is not None and is_member(name):
                    key, extension = split_name(name)
                    if key != last_key or extension in extensions:
                        if offsets:
                            finish(start)
                        offsets.append(window.keep(start))
                        last_key, extensions = key, set()
                    extensions.add(extension)
                position = data + length + padding(length)
            if offsets:
                finish(position)
        except BadSampleError as error:
            raise ShardError(f"{path} behind byte {position}: {error}") from None
        if not offsets:
            raise ShardError(f"{path} holds no sample")
        _check_end(path, window, position, size)
    return write_sidecars(path, [*offsets, position], sums, size), unusable


class _Window:
    """Forward reader of a file in large blocks; bytes before the last `keep` are dropped."""

    _BLOCK = 2**18  # what is read stays in the processor's cache until its checksum is taken

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._memory = bytearray(self._BLOCK)
        self._start = self._stop = self._kept = 0

    def keep(self, start: int) -> int:
        self._kept = start
        return start

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes from start to stop, fewer at the end of the file; valid until the next call."""
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
    """Check of the end marker, the only proof that a tar was not cut between two samples."""
    if size - position < BLOCK:
        raise ShardError(f"{path} is cut: it has no end marker after byte {position}")
    while position < size:
        data = bytes(window.read(window.keep(position), min(size, position + 2**20)))
        if not data or data.strip(b"\0"):
            raise ShardError(f"{path} has data after the end marker at byte {position}")
        position += len(data)
