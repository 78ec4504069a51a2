"""Values that formats share: images named by a path, captions, metadata, names of splits."""

import errno
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from data_prep.corpus_files import list_folder
from data_prep.splits import InputPlan, InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import KEY, strip_text
from megatron_owl2.errors import PreprocessError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_COLUMNS = ("caption", "text", "txt", "title")
_SHOWN = 80  # characters of what was met
# Faults of a path that a corpus names; others are of the disk or network, not of a sample.
_OF_THE_PATH = {
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
}


def cut_rows(
    rows: Sequence[Any],
    size: int,
    origin: Path,
    identity: str,
    payload: Callable[[Sequence[Any]], Any],
) -> InputPlan:
    """One split for every `size` of the rows of one file, named after it and numbered.

    `identity` is a digest of all that was read; `payload` makes a split's of its rows.
    """
    name = sanitize_name(origin.stem)
    return InputPlan(
        [
            InputSplit(
                f"{name}-{start // size:05d}",
                f"{identity} from {start}",
                payload(rows[start : start + size]),
                origin,
            )
            for start in range(0, len(rows), size)
        ]
    )


class SkipError(Exception):
    """Reason why a sample is left out (a category), and what was met; readers make a Skipped."""

    def __init__(self, reason: str, met: str = ""):
        super().__init__(reason)
        self.met = met


class MissingImageError(SkipError):
    """Reason of a sample whose image file does not exist."""

    def __init__(self, path: Path):
        super().__init__("image file is missing", f"{path}")


def skipped(error: Exception, where: str) -> Skipped:
    """Sample that is left out for `error`; `where` says which one it is."""
    met = getattr(error, "met", "")
    return Skipped(str(error), f"{where}: {met}" if met else where)


def sanitize_name(text: str) -> str:
    """Text with every character that a split's name cannot hold replaced by `_`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def record_key(key: str, metadata: dict[str, Any]) -> str:
    """The key of a sample or, for one that a record cannot have, a readable stand-in with a hash;
    `metadata["key"]` becomes the original then."""
    if KEY.fullmatch(key):
        return key
    metadata["key"] = key
    return f"{sanitize_name(key)[-60:]}-{xxhash.xxh3_64_hexdigest(key.encode(errors='replace'))}"


def images_folder(source: Path, options: ReadOptions) -> Path:
    """Folder of the images that `source` names; raises PreprocessError without one."""
    if options.images is None:
        raise PreprocessError(f"{source} names images; say where they are with --images DIR")
    if not options.images.is_dir():
        raise PreprocessError(f"--images {options.images} is not a folder")
    return options.images


def refuse_images(options: ReadOptions, kind: str) -> None:
    """Check for formats without image paths; raises PreprocessError if `--images` is given."""
    if options.images is not None:
        raise PreprocessError(f"{kind}; leave out --images")


def refuse_columns(options: ReadOptions, *, captions: bool = False) -> None:
    """Check for formats without columns, or with `captions` alone; raises PreprocessError."""
    if options.image_column is not None:
        raise PreprocessError("this format has no column of images; leave out --image-column")
    if options.caption_column is not None and not captions:
        raise PreprocessError("this format has no choice of captions; leave out --caption-column")


def read_image(images: Path, name: Any) -> bytes:
    """Bytes of the image that a corpus names by a path relative to `images`.

    The path cannot climb out of the folder; symbolic links in it are followed. Raises SkipError,
    and OSError if the file system fails.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise SkipError("image is not one path", shown(name))
    if name.lower().startswith(("http://", "https://")):
        raise SkipError(
            "image is an address, not a file: download it (tools/prepare_downloads.py)", shown(name)
        )
    try:
        return _read_below(images, name)
    except FileNotFoundError:
        if "\\" not in name:
            raise MissingImageError(images / name) from None
    except UnicodeEncodeError:
        raise SkipError("image path is not valid Unicode") from None
    return read_image(images, name.replace("\\", "/"))  # as Windows separates folders


def _read_below(images: Path, name: str) -> bytes:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise SkipError("image path leaves the images folder", shown(name))
    try:
        return (images / path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno not in _OF_THE_PATH:
            raise
        reason = f"image file cannot be read ({os.strerror(error.errno)})"
        raise SkipError(reason, f"{images / path}") from None


def image_folders(images: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """Folders in which published images may lie: `images` itself, those of these names in it, and
    those of these names in the folders in it."""
    places = [images, *list_folder(images)[1]]
    found = [place / name for place in places for name in names]
    return (images, *(folder for folder in found if folder.is_dir()))


def read_first_image(folders: Sequence[Path], names: Sequence[Any]) -> bytes:
    """Bytes of the first image that is there under one of `names`, in the first of `folders`.

    Raises SkipError as `read_image` does; of an image that is nowhere it names the first path.
    """
    for folder in folders:
        for name in names:
            with suppress(MissingImageError):
                return read_image(folder, name)
    raise MissingImageError(folders[0] / names[0])


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def caption(value: Any) -> str:
    """Caption without the white space and byte order marks around it; raises SkipError if nothing
    is left."""
    if value is None or value == "":
        raise SkipError("empty caption")
    if not isinstance(value, str):
        raise SkipError("caption is not a text", shown(value))
    if "\0" in value:
        raise SkipError("caption holds zero bytes: text in UTF-16 or UTF-32?")
    if not (text := strip_text(value)):
        raise SkipError("empty caption")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SkipError("caption is not valid Unicode", shown(value)) from None
    return text


def scalars(row: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """Strings, booleans and finite numbers of a row, in the row's order."""
    return {
        name: value
        for name, value in row.items()
        if name not in without
        and (isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)))
    }
