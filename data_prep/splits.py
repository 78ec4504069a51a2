"""What a reader of a published corpus (data_prep/) and the job that shards it say to each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ReadOptions:
    """How to read an input: `images` is the folder that picture paths are relative to, a part has
    about `samples_per_part` samples where the input can be cut anywhere, and the columns name where
    a table has the picture's path and the caption (None: the usual names are tried)."""

    images: Path | None = None
    samples_per_part: int = 10_000
    image_column: str | None = None
    caption_column: str | None = None


@dataclass(frozen=True)
class InputSplit:
    """A piece of the input that one process turns into shards.

    `name` goes into shard names, `identity` changes when the input does, `payload` is what the
    reader needs and can be pickled, `origin` is the file or folder it is of.
    """

    name: str
    identity: str
    payload: Any
    origin: Path


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out: why (a category, to be counted) and which."""

    reason: str
    detail: str
