"""Values that a format hands to the job that shards its input: splits, and samples left out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading an input, as `Format.plan` gets them.

    `images` is the folder that image paths are relative to. A split has about `samples_per_split`
    samples where the input can be cut anywhere. The columns of a table hold the image's path and
    the caption (None: the usual names are tried).
    """

    images: Path | None = None
    samples_per_split: int = 10_000
    image_column: str | None = None
    caption_column: str | None = None


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
class Skipped:
    """Sample that was left out: the reason (a category, to be counted) and which sample it was."""

    reason: str
    detail: str
