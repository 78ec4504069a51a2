"""Plain webdataset tars: an image with a caption in .txt or .json; our own shards too.

They may be compressed, with or without an ending that says so.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.corpus_files import find_files, why_unread
from data_prep.formats.common.inputs import (
    CAPTION_COLUMNS,
    IMAGE_EXTENSIONS,
    SkipError,
    caption,
    record_key,
    refuse_columns,
    refuse_images,
    sanitize_name,
    scalars,
    skipped,
)
from data_prep.formats.common.tars import ENDINGS, is_tar, member_of, read_tar, tar_stem
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.manifest import MANIFEST
from megatron_owl2.data.shards.records import (
    COMMON_FIELDS,
    FIELDS,
    Record,
    decode_text,
    why_unusable,
)
from megatron_owl2.errors import BadSampleError, PreprocessError
from megatron_owl2.utils.json_text import parse_json


class Webdataset:
    """Tar files whose neighbouring members with one key are a sample."""

    name = "webdataset"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for the tar file, or for each in the folder and the folders in it.

        Raises PreprocessError if there is none.
        """
        refuse_images(options, "webdataset keeps images with their texts")
        refuse_columns(options, captions=True)
        if source.is_file():
            paths, root, unread = [source], source.parent, []
        else:
            root = source
            found = find_files(source, options.output)
            paths, unread = found.select(is_tar, partial(_is_companion, source))
        if not paths:
            raise PreprocessError(
                f"{source} holds no tar file ({', '.join(ENDINGS)}, or .tar compressed)"
                + why_unread(unread)
            )
        splits = [
            InputSplit(
                sanitize_name(str(path.relative_to(root).with_name(tar_stem(path)))),
                f"{path.stat().st_size} bytes, changed {path.stat().st_mtime_ns}",
                (path, options.caption_column),
                path,
            )
            for path in paths
        ]
        return InputPlan(splits, unread)

    def read(self, payload: tuple[Path, str | None]) -> Iterator[Record | Skipped]:
        """Samples of one tar file.

        The caption is the .txt member or, without one or with `caption_column`, a value of the
        .json member. What distinguishes names with dots (`a.v1.jpg`, `a.v1.txt`) becomes part of
        the key. A key with characters that a record's key cannot have is sanitized and gets a
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
                yield skipped(error, f"{path.name}, {key} ({_listing(members)})")


def _record(key: str, members: dict[str, bytes], caption_column: str | None, path: Path) -> Record:
    json_name = member_of(members, ("json",), "json")
    row = {} if json_name is None else _row(members[json_name])
    if COMMON_FIELDS <= row.keys() <= FIELDS:
        try:
            record = Record.from_members(key, members)
            return replace(record, key=record_key(key, record.metadata))
        except BadSampleError:
            if "turns" in row:
                reason = why_unusable(key, members) or "damaged sample of a shard"
                raise SkipError(reason) from None
    image_name = member_of(members, IMAGE_EXTENSIONS, "image")
    if image_name is None:
        raise SkipError("no image")
    text_name = member_of(members, ("txt",), "text")
    name = caption_column or next((c for c in CAPTION_COLUMNS if c in row), None)
    if text_name is not None and caption_column is None:
        text = decode_text(members[text_name])
    elif name is None and json_name is None:
        raise SkipError("no .txt or .json with a caption")
    elif name is None or name not in row:
        raise SkipError("no caption in the .json member; name its field with --caption-column")
    else:
        text = row[name]
    metadata = scalars(row, without=() if name is None else (name,))
    middle = image_name.rpartition(".")[0]
    if middle and middle == (text_name or json_name or "").rpartition(".")[0]:
        key = f"{key}.{middle}"
    return Record(
        record_key(key, metadata),
        images=(members[image_name],),
        caption=caption(text),
        source=path.parent.name,
        metadata=metadata,
    )


def _row(data: bytes) -> dict[str, Any]:
    try:
        row = parse_json(data)
    except ValueError:
        raise SkipError("the .json member is not JSON") from None
    if not isinstance(row, dict):
        raise SkipError("the .json member is not an object")
    return row


def _listing(members: dict[str, bytes]) -> str:
    return ", ".join(f".{extension}" for extension in sorted(members))


def _is_companion(source: Path, path: Path) -> bool:
    """Whether a file belongs to a data set of ours beside its tar files."""
    names = (MANIFEST, "report.json", "report.html")
    inside = path.relative_to(source).parts
    work = "preprocess" in inside
    if work:
        above = source.joinpath(*inside[: inside.index("preprocess")])
        work = (above / "preprocess/job.json").exists()
    return path.name in names or path.suffix in (".idx", ".sums") or work


FORMATS: tuple[Format, ...] = (Webdataset(),)
