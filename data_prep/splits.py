"""Values that a format hands to the job that shards its input: splits, and what is left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.corpus_files import UnreadFile


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading an input, as `Format.plan` gets them.

    `images` is the folder that image paths are relative to. A split has about `samples_per_split`
    samples where the input can be cut anywhere. The columns of a table hold the image's path and
    the caption (None: the usual names are tried). `output` is no part of the input, though it may
    lie there.
    """

    images: Path | None = None
    samples_per_split: int = 10_000
    image_column: str | None = None
    caption_column: str | None = None
    output: Path | None = None


@dataclass(frozen=True)
class InputSplit:
    """Piece of the input that one process turns into shards.

    `name` begins the names of its shards, `identity` changes when the input does, `payload` is the
    picklable argument of `Format.read`, `origin` the file or folder that it comes from.
    """

    name: str
    identity: str
    payload: Any
    origin: Path


@dataclass(frozen=True)
class InputPlan:
    """Splits of an input, in the order in which their samples are stored, and the files in it that
    no split reads."""

    splits: Sequence[InputSplit]
    unread: Sequence[UnreadFile] = ()


@dataclass(frozen=True)
class Skipped:
    """Sample that was left out: the reason (a category, to be counted) and which sample it was.

    `expected` says that nothing is wrong with it: a filter, a duplicate or the draw of a sample
    left it out, or its download had failed. Of these examples are kept, of the others all.
    """

    reason: str
    detail: str
    expected: bool = False
