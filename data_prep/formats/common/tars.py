"""Samples from tar files of other tools: PAX and GNU headers are read, damage is reported."""

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.splits import Skipped
from megatron_owl2.data.shards.tar import BLOCK, entries, padding, split_name
from megatron_owl2.errors import BadSampleError

DAMAGED = "rest of a damaged file"
Sample = tuple[str, dict[str, bytes]]  # key, and extension to bytes


def read_tar(path: Path) -> Iterator[Sample | Skipped]:
    """Samples of a tar file: neighbouring members with one key, as webdataset groups them.

    The rest of a damaged archive is skipped as one, since its number of samples is unknown.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size

        def read(start: int, stop: int) -> bytes:
            return os.pread(file.fileno(), stop - start, start)

        sample_key, members, repeated, end = "", {}, False, 0
        try:
            for _, name, start, length in entries(read, 0, size):
                end = start + length + padding(length)
                if name is None:
                    continue
                key, extension = split_name(name)
                if key != sample_key:
                    if members:
                        yield _sample(sample_key, members, repeated)
                    sample_key, members, repeated = key, {}, False
                repeated |= extension in members
                members[extension] = read(start, start + length)
            intact = _ends_here(file, end)
        except BadSampleError:
            intact = False
        if members:
            yield _sample(sample_key, members, repeated)
        if not intact:
            yield Skipped(DAMAGED, str(path))


def _sample(key: str, members: dict[str, bytes], repeated: bool) -> Sample | Skipped:
    return Skipped("a member of the sample occurs twice", key) if repeated else (key, members)


def _ends_here(file, position: int) -> bool:
    """Whether the end marker follows and nothing after it, and the file is of whole blocks; else
    it may be cut, or have lost bytes before."""
    file.seek(position)
    length = 0
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            return False
        length += len(block)
    return length >= BLOCK and (position + length) % BLOCK == 0
