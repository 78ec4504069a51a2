"""LLaVA and ShareGPT conversations: [{id, image?, conversations: [{from, value}]}]."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.formats.common.inputs import SkipError, images_folder, read_image, sanitize_name
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record, Turn
from megatron_owl2.errors import BadSampleError, PreprocessError

_TAGS = ("<image>", IMAGE_PLACEHOLDER)  # LLaVA's and mPLUG-Owl2's placeholders of the image


class Conversations:
    """Conversations about one image or none; questions and answers alternate."""

    name = "conversations"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` entries of the JSON list.

        Raises PreprocessError if the file is not such a list, or names images and
        `options.images` is None.
        """
        if not source.is_file():
            raise PreprocessError(
                f"{source} is not a file; name the JSON file of the conversations"
            )
        data = source.read_bytes()
        try:
            entries = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise PreprocessError(f"{source} is not JSON: {error}") from None
        if not isinstance(entries, list):
            raise PreprocessError(f"{source} must hold a list of conversations")
        images = options.images
        if images or any(isinstance(entry, dict) and entry.get("image") for entry in entries):
            images = images_folder(source, options)
        digest = hashlib.sha256(data).hexdigest()
        name = sanitize_name(source.stem)
        splits = [
            InputSplit(
                f"{name}-{start // options.samples_per_split:05d}",
                f"{digest} from {start}",
                (start, entries[start : start + options.samples_per_split], images, source.stem),
                source,
            )
            for start in range(0, len(entries), options.samples_per_split)
        ]
        return InputPlan(splits)

    def read(self, payload: tuple[int, list, Path | None, str]) -> Iterator[Record | Skipped]:
        """Records of consecutive entries; the key is the entry's number in the file.

        The image tag must be in the first question. It is moved to the front, and the newlines
        around it are dropped.
        """
        start, entries, images, source = payload
        for index, entry in enumerate(entries, start):
            try:
                yield _record(index, entry, images, source)
            except (SkipError, BadSampleError) as error:
                name = entry.get("id") if isinstance(entry, dict) else None
                yield Skipped(str(error), f"entry {index}, id {name}")


def _record(index: int, entry: Any, images: Path | None, source: str) -> Record:
    if not isinstance(entry, dict):
        raise SkipError("entry is not an object")
    texts = _texts(entry.get("conversations"))
    tags = [sum(text.count(tag) for tag in _TAGS) for text in texts]
    image = None
    if entry.get("image") is not None:
        if sum(tags) > 1:
            raise SkipError("more than one image tag")
        if any(tags[1:]):
            raise SkipError("image tag outside the first question")
        for tag in _TAGS:
            texts[0] = texts[0].replace(tag, "")
        assert images is not None  # plan asks for the folder if an entry names an image
        image = read_image(images, entry["image"])
    elif any(tags):
        raise SkipError("image tag without an image")
    texts = [text.strip() for text in texts]
    if not all(texts[1:]) or not (texts[0] or image):
        raise SkipError("empty turn")
    if image is not None:
        texts[0] = IMAGE_PLACEHOLDER + texts[0]
    return Record(
        key=f"{index:09d}",
        image=image,
        turns=tuple(map(Turn, texts[::2], texts[1::2])),
        source=source,
        metadata={"id": entry["id"]} if "id" in entry else {},
    )


def _texts(messages: Any) -> list[str]:
    """Texts of the messages: question and answer alternate."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise SkipError("conversations is not a list of messages")
    if not messages:
        raise SkipError("no turns")
    speakers = [message.get("from") for message in messages]
    texts = [message.get("value") for message in messages]
    if not all(speaker in ("human", "gpt") for speaker in speakers):
        raise SkipError("a speaker is neither human nor gpt")
    if not all(isinstance(text, str) for text in texts):
        raise SkipError("a message has no text")
    if speakers[0] == "gpt":
        raise SkipError("conversation starts with gpt")
    if speakers != ["human", "gpt"] * (len(speakers) // 2) + ["human"] * (len(speakers) % 2):
        raise SkipError("human and gpt do not take turns")
    if speakers[-1] == "human":
        raise SkipError("last question has no answer")
    return texts


FORMATS: tuple[Format, ...] = (Conversations(),)
