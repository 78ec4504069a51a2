"""Reads what img2dataset wrote: NNNNN.tar (webdataset) or NNNNN/ (files) of image, text, JSON."""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_owl2.data.records import BadSampleError, Record, image_extension
from megatron_owl2.data.tar import split_name
from megatron_owl2.preprocess.parts import Part, PreprocessError, ReadOptions, Skipped

_IMAGES = ("jpg", "jpeg", "png", "webp")
_KEPT_METADATA = ("url", "sha256", "original_width", "original_height")


def plan(source: Path, options: ReadOptions) -> list[Part]:
    """One part for each tar file or numbered folder of an img2dataset output folder.

    Raises PreprocessError if there is none, or both kinds.
    """
    if options.images is not None:
        raise PreprocessError("img2dataset keeps pictures with their texts; leave out --images")
    if not source.is_dir():
        raise PreprocessError(f"{source} is not a folder; name the output folder of img2dataset")
    tars = sorted(source.glob("*.tar"))
    folders = sorted(path for path in source.iterdir() if path.is_dir() and path.name.isdigit())
    if tars and folders:
        raise PreprocessError(f"{source} holds both tar files and numbered folders; separate them")
    if not tars and not folders:
        raise PreprocessError(f"{source} holds neither NNNNN.tar nor NNNNN/: not from img2dataset")
    parts = [Part(path.stem, f"{path.stat().st_size} bytes", path) for path in tars]
    parts += [Part(path.name, f"changed {path.stat().st_mtime_ns}", path) for path in folders]
    return parts


def read(path: Path) -> Iterator[Record | Skipped]:
    """The samples of one tar file or folder.

    Rows whose status is not "success" are skipped. The rest of a damaged tar file is skipped as
    one, since its number of samples is unknown.
    """
    samples = _read_folder(path) if path.is_dir() else _read_tar(path)
    for item in samples:
        yield item if isinstance(item, Skipped) else _record(*item, source=path.parent.name)


def _read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]] | Skipped]:
    with path.open("rb") as file:
        position = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                files = (member for member in tar if member.isreg())
                for key, members in groupby(files, lambda member: split_name(member.name)[0]):
                    yield key, {split_name(m.name)[1]: tar.extractfile(m).read() for m in members}
                position = tar.offset
            intact = _ends_here(file, position)
        except tarfile.TarError:
            intact = False
        if not intact:
            yield Skipped("rest of a damaged tar file", str(path))


def _ends_here(file, position: int) -> bool:
    """Whether only zeros follow; tarfile takes a damaged or missing header for the end."""
    file.seek(position)
    empty = True
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            return False
        empty = False
    return not empty


def _read_folder(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    for key, group in groupby(names, lambda name: split_name(name)[0]):
        yield key, {split_name(name)[1]: (folder / name).read_bytes() for name in group}


def _record(key: str, parts: dict[str, bytes], source: str) -> Record | Skipped:
    row = _row(parts.get("json"))
    if row is None:
        return Skipped("no readable .json part", key)
    if row.get("status") != "success":
        return Skipped(f"status {row.get('status')}", key)
    image = next((parts[extension] for extension in _IMAGES if extension in parts), None)
    if image is None:
        return Skipped("no image", key)
    if "txt" in parts:
        caption = parts["txt"].decode(errors="replace").strip()
    else:
        caption = str(row.get("caption") or "").strip()
    if not caption:
        return Skipped("empty caption", key)
    try:
        image_extension(image)
    except BadSampleError as error:
        return Skipped(str(error), key)
    metadata = {name: row[name] for name in _KEPT_METADATA if name in row}
    try:
        return Record(key, image=image, caption=caption, source=source, metadata=metadata)
    except BadSampleError as error:
        return Skipped("unusable record", f"{key}: {error}")


def _row(data: bytes | None) -> dict[str, Any] | None:
    try:
        row = json.loads(data or b"")
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
