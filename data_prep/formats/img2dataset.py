"""Output of img2dataset: NNNNN.tar (webdataset), NNNNN/ (files) or NNNNN.parquet (parquet).

Whatever the form, NNNNN_stats.json says how many addresses gave no image; they are counted.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import xxhash

from data_prep.corpus_files import CorpusFiles, UnreadFile, list_folder, why_unread
from data_prep.formats.common import parquet, tables
from data_prep.formats.common.inputs import (
    IMAGE_EXTENSIONS,
    SkipError,
    caption,
    refuse_columns,
    refuse_images,
    scalars,
)
from data_prep.formats.common.tars import DAMAGED, Sample, is_tar, member_of, read_tar, tar_stem
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record, decode_text
from megatron_owl2.data.shards.tar import is_member, split_name
from megatron_owl2.errors import BadSampleError, PreprocessError
from megatron_owl2.utils.files import is_hidden
from megatron_owl2.utils.json_text import parse_json

# Columns of img2dataset itself: the same for every image that arrived, or long.
_BOOKKEEPING = ("key", "caption", "status", "error_message", "exif")
_Row = tuple[str, bytes | None, dict[str, Any]]  # key, image, columns
_KINDS = ((("json",), "json"), (("txt",), "text"), (IMAGE_EXTENSIONS, "image"))
_MOST = 10**7  # samples of a shard
_FAILURES = ("failed_to_download", "failed_to_resize")


class Img2dataset:
    """Output folder of a finished img2dataset download, in any of its three forms."""

    name = "img2dataset"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for each shard of an img2dataset output folder.

        Raises PreprocessError if there is none, several forms, or a shard that is not finished.
        """
        refuse_images(options, "img2dataset keeps images with their texts")
        refuse_columns(options)
        if not source.is_dir():
            raise PreprocessError(
                f"{source} is not a folder; name the output folder of img2dataset"
            )
        tars, folders, tables_found, unread = _find_shards(source)
        if tars and folders:
            raise PreprocessError(
                f"{source} holds both tar files and numbered folders; separate them"
            )
        shards = tars or folders
        if not shards:  # beside tars and folders, the same names hold the metadata
            shards = tables_found if _hold_images(tables_found) else []
        if not shards:
            raise PreprocessError(
                f"{source} holds neither NNNNN.tar nor NNNNN/ nor NNNNN.parquet with images: not "
                f"from img2dataset{why_unread(unread)}"
            )
        unread += _without_shard(source, shards)
        unfinished = [path.name for path in shards if not _stats_file(path).exists()]
        if unfinished:
            lost = "use --format webdataset" if tars else "write {} to the _stats.json of each"
            raise PreprocessError(
                f"img2dataset has not finished {len(unfinished)} of {len(shards)} shards "
                f"({', '.join(unfinished[:3])}) in {source}: they have no _stats.json; start the "
                f"download again, it continues. If nothing but the statistics is lost, {lost}"
            )
        splits = [InputSplit(_stem(path), _identity(path), path, path) for path in shards]
        return InputPlan(splits, unread)

    def read(self, payload: Path) -> Iterator[Record | Skipped]:
        """Samples of one shard.

        Rows whose status is not "success" are skipped, and so is every row of the statistics that
        is not in the shard. The metadata are all columns but those img2dataset uses itself.
        """
        path, found = payload, 0
        if path.suffix == ".parquet":
            samples = _read_parquet(path)
        elif path.is_dir():
            samples = map(_sample, _read_folder(path))
        else:
            samples = map(_sample, read_tar(path))
        for item in samples:
            found += not (isinstance(item, Skipped) and item.reason == DAMAGED)
            yield item if isinstance(item, Skipped) else _record(*item, source=path.parent.name)
        yield from _not_there(path, found)


def _hold_images(paths: list[Path]) -> bool:
    """Whether the first Parquet file that can be read has a column of images."""
    if paths:
        parquet.import_pyarrow()  # without pyarrow no file could be read
    for path in paths:
        with suppress(PreprocessError), parquet.open_parquet(path) as file:
            return any(name in IMAGE_EXTENSIONS for name in file.schema_arrow.names)
    return False


def _find_shards(source: Path) -> tuple[list[Path], list[Path], list[Path], list[UnreadFile]]:
    """Tar files, numbered folders and tables of an output folder, and what else is in it."""
    files, folders, unread = list_folder(source)
    tars, unread = CorpusFiles(files, unread).select(is_tar, _is_metadata)
    numbered = [path for path in folders if path.name.isdigit()]
    unread += [
        UnreadFile(path, "folder that is no shard of img2dataset")
        for path in folders
        if path not in numbered
    ]
    return tars, numbered, [path for path in files if path.suffix == ".parquet"], unread


def _is_metadata(path: Path) -> bool:
    return path.name.endswith((".parquet", "_stats.json"))


def _without_shard(source: Path, shards: list[Path]) -> list[UnreadFile]:
    """Statistics whose shard is not there."""
    known = {_stats_file(path).name for path in shards}
    return [
        UnreadFile(path, "statistics of a shard that is not there")
        for path in sorted(source.glob("*_stats.json"))
        if path.name not in known and not is_hidden(path.name)
    ]


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else tar_stem(path)


def _stats_file(path: Path) -> Path:
    return path.with_name(f"{_stem(path)}_stats.json")


def _identity(path: Path) -> str:
    status = path.stat()
    found = f"{status.st_size} bytes, changed {status.st_mtime_ns}"
    if not path.is_dir():
        return found
    digest = xxhash.xxh3_128()  # of the files, of which the folder's own time says nothing
    members = sorted(_members(path), key=lambda entry: entry.name)
    statuses = [(entry.name, entry.stat()) for entry in members]
    for name, status in [*statuses, ("", _stats_file(path).stat())]:
        digest.update(b"%s/%d/%d/" % (os.fsencode(name), status.st_size, status.st_mtime_ns))
    return f"{found}, files {digest.hexdigest()}"


def _members(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.is_file() and is_member(entry.name)]


def _read_folder(folder: Path) -> Iterator[Sample | Skipped]:
    names = sorted(entry.name for entry in _members(folder))
    for key, group in groupby(names, lambda name: split_name(name)[0]):
        members = list(group)
        found = {split_name(name)[1]: (folder / name).read_bytes() for name in members}
        if len(found) < len(members):  # in another letter case
            yield Skipped("a member of the sample occurs twice", key)
        else:
            yield key, found


def _read_parquet(path: Path) -> Iterator[_Row | Skipped]:
    try:
        for piece in tables.cut(path, rows=1 << 40):
            image = next(name for name in piece.columns if name in IMAGE_EXTENSIONS)
            for _, row in tables.read(piece):
                assert isinstance(row, dict)  # only rows of text are skipped
                data = row.pop(image)
                yield str(row.get("key")), data, row
    except PreprocessError:
        yield Skipped(DAMAGED, str(path))


def _sample(item: Sample | Skipped) -> _Row | Skipped:
    """Key, image and row of a sample in files."""
    if isinstance(item, Skipped):
        return item
    key, members = item
    try:
        names = [member_of(members, *kind) for kind in _KINDS]
        row = parse_json(members.get(names[0] or "", b""))
    except SkipError as error:
        return Skipped(str(error), key)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        return Skipped("no readable .json member", key)
    _, text, image = names
    if text is not None:
        row["caption"] = decode_text(members[text])
    return key, None if image is None else members[image], row


def _record(key: str, image: bytes | None, row: dict[str, Any], source: str) -> Record | Skipped:
    if row.get("status") != "success":
        return Skipped(f"status {row.get('status')}", key, expected=True)
    if not image:
        return Skipped("no image", key)
    metadata = scalars(row, without=_BOOKKEEPING)
    try:
        return Record(key, (image,), caption(row.get("caption")), source=source, metadata=metadata)
    except (SkipError, BadSampleError) as error:
        return Skipped(str(error), key)


def _count(value: Any) -> int:
    """A number of the statistics; raises ValueError for what no shard has."""
    if not isinstance(value, int) or not 0 <= value <= _MOST:
        raise ValueError
    return value


def _not_there(path: Path, found: int) -> Iterator[Skipped]:
    """Samples that the statistics count and the shard lacks; only Parquet holds failures."""
    try:
        stats = parse_json(_stats_file(path).read_bytes())
        counts = {name: _count(stats.get(name, 0)) for name in (*_FAILURES, "count")}
        messages = {k: _count(v) for k, v in stats.get("status_dict", {}).items() if k != "success"}
    except FileNotFoundError:
        return
    except (ValueError, TypeError, AttributeError):
        yield Skipped("unreadable _stats.json", path.stem)
        return
    failures = 0
    if path.suffix != ".parquet":
        known = sorted(messages.items(), key=lambda item: -item[1])[:3]
        where = f"shard {path.stem}: " + ", ".join(f"{n} x {message}" for message, n in known)
        for name in _FAILURES:
            failures += counts[name]
            yield from [Skipped(f"status {name}", where, expected=True)] * counts[name]
    lost = max(0, counts["count"] - failures - found)
    yield from [Skipped("counted in the statistics but not there", f"shard {path.stem}")] * lost


FORMATS: tuple[Format, ...] = (Img2dataset(),)
