"""Images of a benchmark: files named by a path or, as COCO names its files, by a number, and bytes
inside its rows."""

import base64
import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.rows import Misfit, short
from megatron_owl2.utils.files import is_hidden

IMAGES = "images"  # folder beside the question file
_LONGEST = 255  # bytes of a name that file systems take
_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_NAME = re.compile(r"(?:(?:COCO|abstract_v002)_([A-Za-z0-9-]+)_)?(\d+)")


def named_image(questions: Path, name: str) -> Path:
    """File in `images/` beside the question file; raises TaskError for a path out of it."""
    return named_file(questions, name, IMAGES)


def named_file(questions: Path, name: str, folder: str) -> Path:
    """File in a folder beside the question file; raises TaskError for a path out of it."""
    path = PurePosixPath(name.replace("\\", "/"))
    out_of_it = path.is_absolute() or ".." in path.parts
    too_long = any(len(part.encode()) > _LONGEST for part in path.parts)
    if not name.strip() or "\0" in name or out_of_it or too_long:
        raise TaskError(
            f"{questions}: {short(repr(name))} is no path in {questions.parent / folder}"
        )
    return questions.parent / folder / path


def one_of_named(questions: Path, *names: str, folder: str = IMAGES) -> Path:
    """The first of these files that is there, as archives are unpacked at several depths, else the
    path of the first name."""
    paths = [named_file(questions, name, folder) for name in names]
    return next((path for path in paths if path.is_file()), paths[0])


def images_in(questions: Path, name: str) -> tuple[Path, ...]:
    """The images of a folder in `images/`, in the order of their names, numbers in them by value;
    raises TaskError if there are none."""
    folder = named_image(questions, name)
    found = [path for path in folder.iterdir() if _is_image(path)] if folder.is_dir() else []
    if not found:
        raise TaskError(f"{folder} has no images; the frames of {name!r} go there")
    return tuple(sorted(found, key=lambda path: (_by_value(path.stem), path.name)))


def _by_value(name: str) -> list[tuple[int, str]]:
    """A key that sorts frame_9 before frame_10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def encoded_image(value: Any, name: str) -> bytes:
    """A reader of an image that a row holds: base64 text, or bytes as Hugging Face's tables have
    them, alone or as {"bytes", "path"}."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, str):
        with suppress(ValueError):
            data = base64.b64decode("".join(data.split()), validate=True)
    if not isinstance(data, bytes) or not data:
        raise Misfit(name, "holds no image, in base64 or as bytes")
    return data


class NumberedImages:
    """Images by number: COCO_<split>_<number>, abstract_v002_<split>_<number> or the number alone.

    Anything else in the folder (masks, sidecars, hidden files) is not what is asked about. Raises
    TaskError if the folder is not there.
    """

    def __init__(self, questions: Path, split: str | None = None):
        self._questions, self._folder = questions, questions.parent / IMAGES
        self._split = split
        if not self._folder.is_dir():
            raise TaskError(f"{self._folder} does not exist; the images of {questions} go there")
        self._found: dict[int, list[tuple[str | None, Path]]] = defaultdict(list)
        for path in sorted(self._folder.iterdir()):
            name = _NAME.fullmatch(path.stem)
            if name and _is_image(path):
                self._found[int(name[2])].append((name[1], path))

    def find(self, number: int) -> Path:
        """The image with a number, in order of preference: of the questions' own split, of another
        one, without a split.

        The path of an image that is not there is the one that COCO would give it. Raises TaskError
        naming two files that could both be meant.
        """
        candidates = self._found.get(number, [])
        for wanted in (
            [path for split, path in candidates if split is not None and split == self._split],
            [path for split, path in candidates if split is not None],
            [path for _, path in candidates],
        ):
            if len(wanted) > 1:
                raise TaskError(
                    f"{self._questions}: image {number} may be {wanted[0]} or {wanted[1]}; leave "
                    "one of them in the folder"
                )
            if wanted:
                return wanted[0]
        prefix = f"COCO_{self._split}_" if self._split else ""
        return self._folder / f"{prefix}{number:012d}.jpg"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _EXTENSIONS and not is_hidden(path.name) and path.is_file()
