"""Samples from tar files of other tools: PAX and GNU headers are fine, damage never goes unseen."""

import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from megatron_owl2.data.tar import split_name
from megatron_owl2.preprocess.parts import Skipped

DAMAGED = "rest of a damaged file"
Sample = tuple[str, dict[str, bytes]]  # key, and extension to bytes


def read_tar(path: Path) -> Iterator[Sample | Skipped]:
    """Neighbouring files of the same key as one sample, as webdataset groups them.

    The rest of a damaged archive is skipped as one, since its number of samples is unknown.
    """
    with path.open("rb") as file:
        position = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                files = (member for member in tar if member.isreg())
                for key, members in groupby(files, lambda member: split_name(member.name)[0]):
                    parts = [(split_name(m.name)[1], tar.extractfile(m).read()) for m in members]
                    if len(dict(parts)) == len(parts):
                        yield key, dict(parts)
                    else:
                        yield Skipped("a part of the sample occurs twice", key)
                position = tar.offset
            intact = _ends_here(file, position)
        except (tarfile.TarError, UnicodeError):
            intact = False
        if not intact:
            yield Skipped(DAMAGED, str(path))


def _ends_here(file, position: int) -> bool:
    """Whether only zeros follow; tarfile takes a damaged or missing header for the end."""
    file.seek(position)
    empty = True
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            return False
        empty = False
    return not empty
