"""Identity of an evaluation: all that its answers depend on, by content and not by name."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from megatron_owl2.errors import CheckpointError
from megatron_owl2.evaluation.benchmark import Gold
from megatron_owl2.evaluation.question import Image, Question, file_of
from megatron_owl2.evaluation.video_files import Video
from megatron_owl2.training.checkpoint import directories

_WHOLE = 64 << 20  # bytes of a file up to which all of it is read
_SAMPLES, _SAMPLE = 64, 1 << 20  # and how many pieces of how many bytes of a longer one


def model_directory(path: Path) -> Path:
    """An export itself, or the checkpoint that a run directory means now. Whoever loads a model and
    marks it gives both this, as a run may save its next checkpoint in between."""
    with suppress(CheckpointError):  # of an export
        return directories.resolve(path)
    return path


def mark_of_model(path: Path) -> str:
    """A mark of the files of an export or of a checkpoint.

    Of files above 64 MiB the length counts and 64 pieces of 1 MiB, evenly spread: weights that were
    trained on differ in all of them.
    """
    digest = xxh3_128()
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode(errors="surrogateescape"))
        with file.open("rb") as content:
            if size <= _WHOLE:
                digest.update(content.read())
                continue
            for piece in range(_SAMPLES):
                content.seek((size - _SAMPLE) * piece // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE))
    return digest.hexdigest()


def mark_of_questions(questions: Sequence[Question], prompts: Iterable[Sequence[str]]) -> str:
    """A mark of ids, whole prompts, texts that are compared, names of images, and conversations."""
    digest = hashlib.sha256()
    for question, asked in zip(questions, prompts, strict=True):
        names = [file.name for image in question.images if (file := file_of(image))]
        compared = question.candidates.pairs if question.candidates else ()
        parts = (question.id, list(asked), compared, names)
        content = repr(parts if question.follows is None else (*parts, question.follows))
        digest.update(content.encode(errors="backslashreplace"))
    return f"{len(questions)} of {digest.hexdigest()[:32]}"


def mark_of_images(questions: Iterable[Question]) -> str:
    """A mark of the images of some questions: of files the lengths, as they are too many to read,
    of videos also which frames, and the content of those that a benchmark holds inside."""
    marks = [_mark_of_image(image) for question in questions for image in question.images]
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:16]


def mark_of_gold(gold: Gold) -> str:
    """A mark of the gold rows, in their order, wherever they lie."""
    digest = hashlib.sha256()
    for i, row in gold.items():
        kept = {name: value for name, value in row.items() if not isinstance(value, os.PathLike)}
        digest.update(repr((i, kept)).encode(errors="backslashreplace"))
    return f"{len(gold)} of {digest.hexdigest()[:32]}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, as "batch_size was 8 and is 4"."""
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def _mark_of_image(image: Image) -> object:
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if isinstance(image, Video):
        shown = image.path.stat().st_size, image.frames, image.segment, image.unit
        # What was added later stands here only where it is chosen: evaluations of before go on.
        return shown + (("ends",) if image.ends else ()) + (("joined",) if image.joined else ())
    return image.stat().st_size
