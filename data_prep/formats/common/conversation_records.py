"""Records of conversations: entries {id, image?, conversations: [{from, value}]} as LLaVA has them,
or {messages: [{role, content}]} as OpenAI has them.

An entry may name several images, and have a text before the first turn (`system`).
"""

import base64
import re
from pathlib import Path
from typing import Any

from data_prep.formats.common.inputs import (
    SkipError,
    read_image,
    shown,
)
from data_prep.formats.common.messages import (
    Message,
    part_names,
    read_messages,
    take_turns,
)
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record, Turn, strip_text

FIELDS = ("conversations", "messages")
# Keys by which collections name files, and which are not read (but image_id, video_length).
_MEDIA = re.compile(r"(image|img|video|audio)s?(_?(file|path|url|file_?name)s?)?", re.IGNORECASE)
_NO_FILES = ("data:", "http://", "https://")  # beginnings of what is not looked for in --images


def names_files(entry: Any) -> bool:
    """Whether an entry names image files, rather than none, addresses or the data themselves."""
    if not isinstance(entry, dict):
        return False
    names = [*_listed(entry), *part_names(_messages(entry))]
    return any(isinstance(n, str) and n and not n.lower().startswith(_NO_FILES) for n in names)


def _listed(entry: dict) -> list[Any]:
    """What `image` and `images` name, the same list once."""
    image, images = _named(entry, "image"), _named(entry, "images")
    return image if image == images else image + images


def _named(entry: dict, key: str) -> list[Any]:
    """What a key names: one name, a list of them, or nothing."""
    value = entry.get(key)
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def _check_keys(entry: dict, has_images: bool) -> None:
    """Check that an entry names no video or audio, and its images by the keys that are read and
    alike; raises SkipError.

    Other keys beside images say where these come from.
    """
    for key, value in entry.items():
        kind = _MEDIA.fullmatch(key)
        if not value or not kind or key in ("image", "images"):
            continue
        if kind[1].lower() in ("video", "audio"):
            raise SkipError("video and audio are not read", f"{key}: {shown(value)}")
        if not has_images:
            reason = "images are named by another key than image and images"
            raise SkipError(reason, f"{key}: {shown(value)}")
    image, images = _named(entry, "image"), _named(entry, "images")
    if image and images and image != images:
        both = f"{shown(image)} and {shown(images)}"
        raise SkipError("image and images name different files", both)


def _messages(entry: dict) -> Any:
    return next((entry[key] for key in FIELDS if entry.get(key) is not None), None)


def conversation_record(index: int, entry: dict, images: Path | None, source: str) -> Record:
    """The record of an entry, with its index as key; raises SkipError and BadSampleError.

    A tag in a question is the place of the next image, in any letter case if the entry has
    images; without any tag all images come before the first question. White space around tags
    that begin a question is dropped, other text stays. In an answer a tag is text.

    What both `image` and `images` name must be the same and is taken once; an empty text or
    list and null name nothing. Video, audio, and images under other keys alone, lose the entry.

    Answers before the first question go, as LLaVA's code does it, and so does a question
    without an answer at the end; `metadata["dropped_turns"]` counts them.
    """
    if (found := _messages(entry)) is None:
        raise SkipError("no conversations or messages", ", ".join(map(shown, entry)))
    has_images = bool(_listed(entry) or part_names(found))
    _check_keys(entry, has_images)
    conversation = take_turns(read_messages(found, has_images))
    system, messages = _system(entry, conversation.system), conversation.turns
    names = _image_names(entry, messages)
    if names and any(message.places for message in conversation.dropped):
        raise SkipError("image tag in a question that is dropped")
    texts = [message.text for message in messages]
    if names and not any(message.places for message in messages):
        texts[0] = IMAGE_PLACEHOLDER * len(names) + texts[0]
    if not all(texts):
        raise SkipError("empty turn")
    metadata = {"id": entry["id"]} if "id" in entry else {}
    dropped = len(conversation.dropped)
    return Record(
        key=f"{index:09d}",
        images=tuple(_image(name, images) for name in names),
        turns=tuple(map(Turn, texts[::2], texts[1::2])),
        system=system,
        source=source,
        metadata=metadata | ({"dropped_turns": dropped} if dropped else {}),
    )


def _system(entry: dict, of_turn: str) -> str:
    """The text before the first turn, of the entry or `of_turn`, a system turn."""
    top = entry.get("system")
    if top is not None and not isinstance(top, str):
        raise SkipError("system is not a text", shown(top))
    texts = list(dict.fromkeys(text for text in (strip_text(top or ""), of_turn) if text))
    if len(texts) > 1:
        raise SkipError("system text and another one in a system turn")
    return "".join(texts)


def _image_names(entry: dict, messages: list[Message]) -> list[Any]:
    """The name of every image in the order of its place; raises SkipError if places and images do
    not match."""
    places = [place for message in messages for place in message.places]
    listed = _listed(entry)
    unnamed = sum(place.name is None for place in places)
    if not places:
        return listed
    if not listed and unnamed == len(places):
        raise SkipError("image tag without an image")
    if unnamed != len(listed):
        word = "more" if unnamed > len(listed) else "fewer"
        raise SkipError(f"{word} image tags than images", f"{unnamed} for {len(listed)}")
    rest = iter(listed)
    return [next(rest) if place.name is None else place.name for place in places]


def _image(name: Any, images: Path | None) -> bytes:
    """Bytes of an image that is named or, as a data: URL, given."""
    if not isinstance(name, str) or not name.lower().startswith("data:"):
        # Without a folder nothing names a file, and read_image says what else it is.
        return read_image(images or Path(), name)
    header, comma, data = name.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise SkipError("data: URL of an image is not base64", shown(name))
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError:
        raise SkipError("data: URL of an image is not base64", shown(name)) from None
