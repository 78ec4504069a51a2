"""LLaVA, ShareGPT and OpenAI conversations, as a JSON list or JSON lines.

LLaVA's are [{id, image?, conversations: [{from, value}]}], OpenAI's [{messages: [{role,
content}]}].
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.formats.common.encodings import check_data
from data_prep.formats.common.inputs import (
    SkipError,
    images_folder,
    read_image,
    refuse_columns,
    sanitize_name,
    shown,
    skipped,
)
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record, Turn, strip_text
from megatron_owl2.errors import BadSampleError, PreprocessError
from megatron_owl2.utils.json_text import is_json_list, json_lines, parse_json

_TAGS = ("<image>", IMAGE_PLACEHOLDER)  # LLaVA's and mPLUG-Owl2's placeholders of the image
_SPEAKERS = {  # of LLaVA and ShareGPT, of OpenAI, and of collections of ShareGPT
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "chatgpt": "gpt",
    "system": "system",
}
_SYSTEM = "system turn, which a record cannot hold"
_FIELDS = ("conversations", "messages")
_ROLE = 20  # characters of an unknown speaker in a reason


class Conversations:
    """Conversations about one image or none; questions and answers alternate."""

    name = "conversations"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` entries of the file.

        Raises PreprocessError if the file holds no list, or names images and `options.images` is
        None.
        """
        refuse_columns(options)
        if not source.is_file():
            raise PreprocessError(
                f"{source} is not a file; name the JSON file of the conversations"
            )
        check_data(source)
        data = source.read_bytes()
        entries = _parse(data, source)
        images = options.images
        if images or any(_names_images(entry) for _, entry in entries):
            images = images_folder(source, options)
        digest = hashlib.sha256(data).hexdigest()
        name = sanitize_name(source.stem)
        splits = [
            InputSplit(
                f"{name}-{start // options.samples_per_split:05d}",
                f"{digest} from {start}",
                (start, entries[start : start + options.samples_per_split], images, source),
                source,
            )
            for start in range(0, len(entries), options.samples_per_split)
        ]
        return InputPlan(splits)

    def read(self, payload: tuple[int, list, Path | None, Path]) -> Iterator[Record | Skipped]:
        """Records of consecutive entries; the key is the entry's number in the file.

        The image tag must be in the first question. It is moved to the front, and the newlines
        around it are dropped. An answer before the first question goes, as LLaVA's code does it,
        and so does a question without an answer at the end; `metadata["dropped_turns"]` counts
        them.
        """
        start, entries, images, source = payload
        for index, (place, entry) in enumerate(entries, start):
            name = entry.get("id") if isinstance(entry, dict) else None
            where = f"{source.name}, {place}, id {shown(name)}"
            if entry is _BROKEN:
                yield Skipped("line is not JSON", where)
                continue
            try:
                yield _record(index, entry, images, source.stem)
            except (SkipError, BadSampleError) as error:
                yield skipped(error, where)


_BROKEN = "broken"  # in place of an entry: a line that is not JSON


def _parse(data: bytes, source: Path) -> list[tuple[str, Any]]:
    """Place, for messages, and content of every entry."""
    try:
        if is_json_list(data):
            entries = [(f"entry {index}", entry) for index, entry in enumerate(parse_json(data))]
            if not entries:
                raise PreprocessError(f"{source} holds no conversation: its list is empty")
            return entries
        entries = []
        for number, line in json_lines(data):
            try:
                entries.append((f"line {number}", parse_json(line)))
            except ValueError:
                entries.append((f"line {number}", _BROKEN))
    except ValueError as error:
        raise PreprocessError(f"{source} is not JSON: {error}") from None
    if not any(isinstance(entry, dict) for _, entry in entries):
        raise PreprocessError(f"{source} is not JSON of conversations, neither a list nor lines")
    if len(entries) == 1 and entries[0][1].keys().isdisjoint(_FIELDS):
        keys = ", ".join(list(entries[0][1])[:5])
        raise PreprocessError(
            f"{source} must hold a list of conversations; it holds one object ({keys})"
        )
    return entries


def _names_images(entry: Any) -> bool:
    return isinstance(entry, dict) and bool(entry.get("image") or entry.get("images"))


def _record(index: int, entry: Any, images: Path | None, source: str) -> Record:
    if not isinstance(entry, dict):
        raise SkipError("entry is not an object")
    texts, dropped = _texts(entry)
    tags = [sum(text.count(tag) for tag in _TAGS) for text in texts]
    name, image = _image_name(entry), None
    if any(tag in text for text in dropped for tag in _TAGS):
        raise SkipError("image tag outside the first question")
    if name is not None:
        if sum(tags) > 1:
            raise SkipError("more than one image tag")
        if any(tags[1:]):
            raise SkipError("image tag outside the first question")
        for tag in _TAGS:
            texts[0] = texts[0].replace(tag, "")
        assert images is not None  # plan asks for the folder if an entry names an image
        image = read_image(images, name)
    elif any(tags):
        raise SkipError("image tag without an image")
    texts = [strip_text(text) for text in texts]
    if not all(texts[1:]) or not (texts[0] or image):
        raise SkipError("empty turn")
    if image is not None:
        texts[0] = IMAGE_PLACEHOLDER + texts[0]
    metadata = {"id": entry["id"]} if "id" in entry else {}
    return Record(
        key=f"{index:09d}",
        images=() if image is None else (image,),
        turns=tuple(map(Turn, texts[::2], texts[1::2])),
        source=source,
        metadata=metadata | ({"dropped_turns": len(dropped)} if dropped else {}),
    )


def _image_name(entry: dict) -> Any:
    """What `image` or `images` names: the only value, or the only entry of a list."""
    found: list = []
    for value in (entry.get("image"), entry.get("images")):
        found += value if isinstance(value, list) else [] if value is None else [value]
    if len(found) > 1:
        raise SkipError("more than one image", f"{len(found)} images")
    return found[0] if found else None


def _texts(entry: dict) -> tuple[list[str], list[str]]:
    """Texts of the messages, question and answer in turn, and of those that were dropped."""
    if entry.get("system"):
        raise SkipError(_SYSTEM)
    messages = next((entry[key] for key in _FIELDS if entry.get(key) is not None), None)
    if messages is None:
        raise SkipError("no conversations or messages", ", ".join(map(shown, entry)))
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise SkipError("conversations is not a list of messages", shown(messages))
    speakers = [_speaker(message) for message in messages]
    texts = [_text(message) for message in messages]
    first = next((i for i, speaker in enumerate(speakers) if speaker == "human"), len(speakers))
    last = len(speakers) - (speakers[-1:] == ["human"])
    kept = speakers[first:last]
    if not kept:
        raise SkipError("no turns")
    if kept != ["human", "gpt"] * (len(kept) // 2):
        raise SkipError("human and gpt do not take turns", ", ".join(speakers))
    return texts[first:last], texts[:first] + texts[last:]


def _speaker(message: dict) -> str:
    """`human` or `gpt`; raises SkipError for others."""
    role = next((message[key] for key in ("from", "role") if message.get(key) is not None), None)
    speaker = _SPEAKERS.get(role.strip().lower()) if isinstance(role, str) else None
    if speaker == "system":
        raise SkipError(_SYSTEM)
    if speaker is None:
        named = role[:_ROLE] if isinstance(role, str) else role
        raise SkipError(f"speaker {shown(named)} is neither human nor gpt")
    return speaker


def _text(message: dict) -> str:
    """Text of a message, in which an image of OpenAI's form is a tag."""
    content = next((message[k] for k in ("value", "content") if message.get(k) is not None), None)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(map(_part, content))
    if not isinstance(content, str):
        raise SkipError("a message has no text", shown(content))
    return content


def _part(part: dict) -> str:
    kind, text = part.get("type"), part.get("text")
    if kind in ("image", "image_url"):
        return _TAGS[0]
    if kind == "text" and isinstance(text, str):
        return text
    raise SkipError("a message has no text", shown(part))


FORMATS: tuple[Format, ...] = (Conversations(),)
