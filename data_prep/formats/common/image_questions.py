"""Questions with short answers, merged by image: all of an image are the turns of one sample."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.formats.common.inputs import (
    SkipError,
    cut_rows,
    image_folders,
    images_folder,
    read_first_image,
    record_key,
    shown,
    skipped,
)
from data_prep.splits import InputPlan, ReadOptions, Skipped
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record, Turn, strip_text
from megatron_owl2.errors import BadSampleError

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # ends every question


class Fault(NamedTuple):
    """Reason why a question is left out (a category), and what was met."""

    reason: str
    met: str = ""


class Pair(NamedTuple):
    """Question of an image with its answer, as published; with a fault it is left out."""

    question_id: str
    question: Any = None
    answer: Any = None
    fault: Fault | None = None


class ImageQuestions(NamedTuple):
    """Questions of one image, of which there is at least one. Those that name no image, all of them
    with a fault, are together under None."""

    image_id: str | None
    pairs: list[Pair]


class Payload(NamedTuple):
    """What reads a split: the folders in which images may lie, the file, the name of the data set,
    and its part of the images."""

    folders: tuple[Path, ...]
    file: str
    corpus: str
    questions: list[ImageQuestions]


def identifier(value: Any, name: str) -> str:
    """An id as a text, published as a whole number or a text; raises SkipError for others."""
    if value is None or value == "":
        raise SkipError(f"no {name}")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SkipError(f"{name} is neither a whole number nor a text", shown(value))
    return str(value)


def text_of(value: Any, name: str) -> str:
    """A text without the white space around it; raises SkipError if it is empty or none."""
    if value is not None and not isinstance(value, str):
        raise SkipError(f"{name} is not a text", shown(value))
    if not (text := strip_text(value or "")):
        raise SkipError(f"empty {name}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SkipError(f"{name} is not valid Unicode", shown(value)) from None
    if IMAGE_PLACEHOLDER in text:
        raise SkipError(f"{name} holds the image placeholder", shown(value))
    return text


class Merger:
    """Pairs by image; images in the order in which they first occur, pairs in the order of adding.

    The later one of two pairs with one id is left out.
    """

    def __init__(self) -> None:
        self._pairs: dict[str | None, list[Pair]] = {}
        self._ids: set[str] = set()

    def add(self, image_id: str, pair: Pair) -> None:
        """Add a pair to its image."""
        if pair.question_id in self._ids:
            pair = Pair(pair.question_id, fault=Fault("question id occurs twice"))
        self._ids.add(pair.question_id)
        self._pairs.setdefault(image_id, []).append(pair)

    def refuse(self, error: SkipError, place: str) -> None:
        """Count an entry at a place of the file that is no pair of an image."""
        met = f"{place}: {error.met}" if error.met else place
        self._pairs.setdefault(None, []).append(Pair("", fault=Fault(str(error), met)))

    def images(self) -> list[ImageQuestions]:
        """All that was added."""
        return [ImageQuestions(*item) for item in self._pairs.items()]


def plan_images(
    corpus: str,
    file: Path,
    identity: str,
    questions: Sequence[ImageQuestions],
    options: ReadOptions,
    folders: Sequence[str],
) -> InputPlan:
    """One split for every `options.samples_per_split` images of a data set.

    `folders` are names of folders that images are published in, `file` is the one that messages
    name, `identity` a digest of all that was read. Raises PreprocessError without `--images`.
    """
    places = image_folders(images_folder(file, options), folders)
    return cut_rows(
        questions,
        options.samples_per_split,
        file,
        f"{corpus} {identity}",
        lambda some: Payload(places, file.name, corpus, list(some)),
    )


def read_images(
    payload: Payload, image_names: Callable[[str], Sequence[str]]
) -> Iterator[Record | Skipped]:
    """Records of a split, one for each image, whose id is the key; `image_names` gives the names
    that the file of an image may have.

    A question that cannot be used is left out alone, and an image that cannot be, or whose name
    raises SkipError, with all of its questions, counted once.
    """
    for image_id, pairs in payload.questions:
        where = payload.file if image_id is None else f"{payload.file}, image {shown(image_id)}"
        turns, used = [], []
        for pair in pairs:
            try:
                turns.append(_turn(pair))
                used.append(pair.question_id)
            except SkipError as error:
                name = f", question {shown(pair.question_id)}" if pair.question_id else ""
                yield skipped(error, f"{where}{name}")
        if image_id is None or not turns:
            continue
        metadata = {"image_id": image_id, "question_ids": used}
        try:
            image = read_first_image(payload.folders, image_names(image_id))
            first = Turn(IMAGE_PLACEHOLDER + turns[0].question, turns[0].answer)
            yield Record(
                record_key(image_id, metadata),
                images=(image,),
                turns=(first, *turns[1:]),
                source=payload.corpus,
                metadata=metadata,
            )
        except (SkipError, BadSampleError) as error:
            plural = "s" if len(turns) > 1 else ""
            yield skipped(error, f"{where} with {len(turns)} question{plural}")


def _turn(pair: Pair) -> Turn:
    if pair.fault:
        raise SkipError(*pair.fault)
    question = text_of(pair.question, "question")
    return Turn(question + SHORT_ANSWER, text_of(pair.answer, "answer"))
