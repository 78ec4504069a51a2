"""Plain webdataset tars: an image with a caption in .txt or .json; our own shards too."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from data_prep.formats.common.inputs import (
    CAPTION_COLUMNS,
    IMAGE_EXTENSIONS,
    SkipError,
    caption,
    refuse_images,
    sanitize_name,
    scalars,
)
from data_prep.formats.common.tars import read_tar
from data_prep.formats.format import Format
from data_prep.splits import InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import KEY, Record
from megatron_owl2.errors import BadSampleError, PreprocessError

_OURS = {"source", "metadata"}  # with a caption or turns, what the .json member of our shards holds


class Webdataset:
    """Tar files whose neighbouring members with one key are a sample."""

    name = "webdataset"

    def plan(self, source: Path, options: ReadOptions) -> list[InputSplit]:
        """One split for the tar file, or for each in the folder and the folders in it.

        Raises PreprocessError if there is none.
        """
        refuse_images(options, "webdataset keeps images with their texts")
        if source.is_file():
            paths, root = [source], source.parent
        else:
            paths, root = sorted(source.rglob("*.tar")), source
        if not paths:
            raise PreprocessError(f"{source} holds no .tar file (compressed ones must be unpacked)")
        return [
            InputSplit(
                sanitize_name(str(path.relative_to(root).with_suffix(""))),
                f"{path.stat().st_size} bytes, changed {path.stat().st_mtime_ns}",
                (path, options.caption_column),
                path,
            )
            for path in paths
        ]

    def read(self, payload: tuple[Path, str | None]) -> Iterator[Record | Skipped]:
        """Samples of one tar file.

        The caption is the .txt member or, without one or with `caption_column`, a value of the
        .json member. A key with characters that a record's key cannot have is sanitized and gets a
        hash appended; `metadata["key"]` is the original key.
        """
        path, caption_column = payload
        for item in read_tar(path):
            if isinstance(item, Skipped):
                yield item
                continue
            key, members = item
            try:
                yield _record(key, members, caption_column, path)
            except (SkipError, BadSampleError) as error:
                yield Skipped(str(error), f"{path.name}, {key}")


def _record(key: str, members: dict[str, bytes], caption_column: str | None, path: Path) -> Record:
    row = _row(members.get("json", b"{}"))
    if row.keys() - {"caption", "turns"} == _OURS:
        try:
            return Record.from_members(key, members)
        except BadSampleError as error:
            raise SkipError("damaged sample of a shard") from error
    images = [name for name in members if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise SkipError("more than one image" if images else "no image")
    name = caption_column or next((c for c in CAPTION_COLUMNS if c in row), "caption")
    if "txt" in members and caption_column is None:
        text = members["txt"].decode(errors="surrogateescape")
    else:
        text = row.get(name)
    metadata = scalars(row, without=(name,))
    if not KEY.fullmatch(key):
        metadata["key"] = key
        key = f"{sanitize_name(key)[-60:]}-{xxhash.xxh3_64_hexdigest(key.encode())}"
    return Record(
        key,
        image=members[images[0]],
        caption=caption(text),
        source=path.parent.name,
        metadata=metadata,
    )


def _row(data: bytes) -> dict[str, Any]:
    try:
        row = json.loads(data)
    except (ValueError, RecursionError):
        raise SkipError("the .json member is not JSON") from None
    if not isinstance(row, dict):
        raise SkipError("the .json member is not an object")
    return row


FORMATS: tuple[Format, ...] = (Webdataset(),)
