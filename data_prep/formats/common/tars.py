"""Samples from tar files of other tools: PAX and GNU headers are read, damage is reported."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_prep.formats.common.compression import open_unpacked, why_not_data
from data_prep.formats.common.inputs import IMAGE_EXTENSIONS, SkipError
from data_prep.splits import Skipped
from megatron_owl2.data.shards.tar import BLOCK, entries, is_member, padding, split_name
from megatron_owl2.errors import BadSampleError

DAMAGED = "rest of a damaged file"
ENDINGS = (".tar", ".tgz", ".tbz2", ".tzst", ".txz")
_COMPRESSED = (".gz", ".bz2", ".zst", ".xz")  # behind .tar
_TEXTS = ("txt", "json")
_LARGEST = 1 << 30  # bytes of a file in an archive; no image is larger
Sample = tuple[str, dict[str, bytes]]  # key, and extension to bytes


def is_tar(path: Path) -> bool:
    """Whether a file is a tar file by its name, compressed or not."""
    name = path.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending) if name.endswith(f".tar{ending}") else name
    return name.endswith(ENDINGS)


def tar_stem(path: Path) -> str:
    """Name of a tar file without its endings."""
    stem = path.stem
    return stem[: -len(".tar")] if stem.lower().endswith(".tar") else stem


def read_tar(path: Path) -> Iterator[Sample | Skipped]:
    """Samples of a tar file, compressed or not: members with one key, as webdataset names them.

    Members that lie apart are put together, unless both places have an image and a text: then the
    key occurs twice. What is no member of a sample (`shards.tar.is_member`) is passed over. The
    rest of a damaged archive is skipped as one, since its number of samples is unknown.
    """
    with open_unpacked(path) as (file, fault):

        def read(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        if reason := why_not_data(read(0, 200)):
            yield Skipped(f"not a tar file: it is {reason}", str(path))
            return
        archives, why_cut = _archives(file, read)
        runs = [run for archive in archives for run in _put_together(archive)]
        for run in runs:
            yield _sample(path, run, read)
        if not (runs or fault or why_cut):
            yield Skipped("tar file without a sample", str(path))
        if fault or why_cut:
            yield Skipped(DAMAGED, f"{path}: {fault or why_cut}")


def member_of(members: Collection[str], endings: Collection[str], kind: str) -> str | None:
    """Extension of a sample's only member of a kind, or None.

    The last part of an extension counts, so `input.jpg` is an image; `txt` comes before `ocr.txt`.
    Raises SkipError if there are several.
    """
    found = [name for name in members if name.rpartition(".")[2] in endings]
    if len(found) > 1:
        whole = [name for name in found if name in endings]
        if kind == "image" or len(whole) != 1:
            several = "files of several samples: their names have dots"
            raise SkipError(several if _several_samples(members) else f"more than one {kind}")
        return whole[0]
    return found[0] if found else None


@dataclass
class _Run:
    """Neighbouring members with one key: extension to offset and size."""

    key: str
    members: dict[str, tuple[int, int]]
    repeated: bool = False

    @property
    def whole(self) -> bool:
        """Whether an image and a text are there."""
        kinds = {name.rpartition(".")[2] for name in self.members}
        return not kinds.isdisjoint(IMAGE_EXTENSIONS) and not kinds.isdisjoint(_TEXTS)


def _archives(
    file: IO[bytes], read: Callable[[int, int], bytes]
) -> tuple[list[list[_Run]], str | None]:
    """Runs of every archive in a file, and why its rest cannot be read, or None.

    Archives that were put together with cat follow each other's end markers.
    """
    size = file.seek(0, 2)
    archives: list[list[_Run]] = []
    start: int | None = 0
    end = 0
    try:
        while start is not None:
            key, runs = None, []
            archives.append(runs)
            for _, name, data, length in entries(read, start, size):
                end = data + length + padding(length)
                if name is None or not is_member(name):
                    continue
                last, (key, extension) = key, split_name(name.removeprefix("./"))
                if key != last:
                    runs.append(_Run(key, {}))
                runs[-1].repeated |= extension in runs[-1].members
                runs[-1].members[extension] = (data, length)
            start = _after_end_marker(file, end)
            end = end if start is None else start
    except BadSampleError as error:
        return archives, f"{error} behind byte {end}"
    return archives, None


def _put_together(runs: list[_Run]) -> list[_Run]:
    """Runs whose members lie apart as one, at the place of the first."""
    kept: list[_Run] = []
    latest: dict[str, _Run] = {}
    for run in runs:
        first = latest.get(run.key)
        apart = first is not None and first.members.keys().isdisjoint(run.members)
        if first is not None and apart and not (first.whole and run.whole):
            first.members |= run.members
            first.repeated |= run.repeated
        else:
            kept.append(run)
            latest[run.key] = run
    return kept


def _sample(path: Path, run: _Run, read: Callable[[int, int], bytes]) -> Sample | Skipped:
    if run.repeated:
        return Skipped("a member of the sample occurs twice", f"{path.name}, {run.key}")
    if any(length > _LARGEST for _, length in run.members.values()):
        reason = f"a member larger than {_LARGEST >> 30} GiB"
        return Skipped(reason, f"{path.name}, {run.key}")
    members = {name: read(start, start + length) for name, (start, length) in run.members.items()}
    return run.key, members


def _several_samples(members: Collection[str]) -> bool:
    """Whether several images have a text each of the same name up to its extension."""
    stems = [
        {name.rpartition(".")[0] for name in members if name.rpartition(".")[2] in endings}
        for endings in (IMAGE_EXTENSIONS, _TEXTS)
    ]
    return len(stems[0] & stems[1]) > 1


def _after_end_marker(file: IO[bytes], position: int) -> int | None:
    """Position of the next archive behind the end marker, or None if nothing follows.

    Raises BadSampleError without an end marker, or if the file is not of whole blocks: it may be
    cut, or have lost bytes before.
    """
    file.seek(position)
    empty = 0
    while block := file.read(BLOCK):
        if block.strip(b"\0"):
            if empty < BLOCK:
                raise BadSampleError("no end of the archive")
            return position + empty
        empty += len(block)
    if empty < BLOCK or (position + empty) % BLOCK:
        raise BadSampleError("no end of the archive")
    return None
