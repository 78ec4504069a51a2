"""Messages of a conversation: speakers, texts, and the places of images in questions.

A message is {from, value} as LLaVA and ShareGPT have it, or {role, content} as OpenAI has it,
whose content is a text or a list of parts. The texts of parts follow each other without anything
between them, as the chat templates of transformers and the exported processor's write them.
"""

import re
from dataclasses import dataclass
from typing import Any

from data_prep.formats.common.inputs import SkipError, shown
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, strip_text

HUMAN, GPT, SYSTEM = "human", "gpt", "system"
_TAG = re.compile(f"<image>|{re.escape(IMAGE_PLACEHOLDER)}")  # LLaVA's tag and mPLUG-Owl2's
_TAG_OF_ANY_CASE = re.compile(_TAG.pattern, re.IGNORECASE)
_UNREAD_TAG = re.compile(r"<video>|<audio>|<\|video\|>", re.IGNORECASE)  # the last is mPLUG-Owl's
_SPEAKERS = {  # of LLaVA and ShareGPT, of OpenAI, and of collections of ShareGPT
    "human": HUMAN,
    "user": HUMAN,
    "gpt": GPT,
    "assistant": GPT,
    "chatgpt": GPT,
    "bing": GPT,
    "bard": GPT,
    "system": SYSTEM,
}
_NAMES = ("image_url", "image", "path", "url")  # where a part or its image_url names a file


@dataclass(frozen=True)
class Place:
    """Place of an image in a question; `name` is the file that an OpenAI part names there itself,
    None for a tag, whose image the entry names."""

    name: Any = None


@dataclass(frozen=True)
class Message:
    """A speaker (HUMAN, GPT or SYSTEM) and what was said: texts, in questions also places."""

    speaker: str
    pieces: list[str | Place]

    @property
    def places(self) -> list[Place]:
        """The places of images, in order."""
        return [piece for piece in self.pieces if isinstance(piece, Place)]

    @property
    def text(self) -> str:
        """The text with a placeholder at every place, stripped; at its beginning there is no
        white space around placeholders."""
        pieces = [IMAGE_PLACEHOLDER if isinstance(p, Place) else p for p in self.pieces]
        text, leading = strip_text("".join(pieces)), ""
        while self.places and text.startswith(IMAGE_PLACEHOLDER):
            leading += IMAGE_PLACEHOLDER
            text = strip_text(text.removeprefix(IMAGE_PLACEHOLDER))
        return leading + text


@dataclass(frozen=True)
class Conversation:
    """The messages of an entry: the text before the first turn, the messages from the first
    question to the last answer, and those that are dropped, answers before and a question without
    an answer after."""

    system: str
    turns: list[Message]
    dropped: list[Message]


def read_messages(messages: Any, has_images: bool) -> list[Message]:
    """The messages of an entry; raises SkipError naming what they lack.

    Tags of images count in any letter case if the entry has images. Otherwise another case is text,
    such as an element of a markup language, and so is a tag of a video or audio file that neither
    begins nor ends a question.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise SkipError("conversations is not a list of messages", shown(messages))
    tag = _TAG_OF_ANY_CASE if has_images else _TAG
    found = [
        Message(speaker, _pieces(m, speaker, tag)) for m in messages for speaker in [_speaker(m)]
    ]
    for message in found:
        if message.speaker == HUMAN and _has_unread_tag(message.text, has_images):
            raise SkipError("tag of a video or an audio file in a question", shown(message.text))
    return found


def part_names(messages: Any) -> list[Any]:
    """The files that OpenAI parts name, whatever else is wrong with the messages."""
    found = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                found.append(_part_name(part))
    return found


def take_turns(messages: list[Message]) -> Conversation:
    """The messages by what becomes of them; raises SkipError if they do not alternate."""
    speakers = [message.speaker for message in messages]
    turns = messages[1:] if speakers[:1] == [SYSTEM] else messages
    order = speakers[len(messages) - len(turns) :]
    if order[:1] == [SYSTEM]:
        raise SkipError("several system turns", ", ".join(speakers))
    if SYSTEM in order:
        raise SkipError("system turn after the first turn", ", ".join(speakers))
    first = order.index(HUMAN) if HUMAN in order else len(order)
    last = len(order) - (order[-1:] == [HUMAN])
    kept = order[first:last]
    if not kept:
        raise SkipError("no turns")
    if kept != [HUMAN, GPT] * (len(kept) // 2):
        raise SkipError("human and gpt do not take turns", ", ".join(speakers))
    system = "" if turns is messages else messages[0].text
    return Conversation(system, turns[first:last], turns[:first] + turns[last:])


def _speaker(message: dict) -> str:
    role = next((message[key] for key in ("from", "role") if message.get(key) is not None), None)
    speaker = _SPEAKERS.get(role.strip().lower()) if isinstance(role, str) else None
    if speaker is None:
        raise SkipError("speaker is neither human nor gpt", shown(role))
    return speaker


def _pieces(message: dict, speaker: str, tag: re.Pattern[str]) -> list[str | Place]:
    content = next((message[k] for k in ("value", "content") if message.get(k) is not None), None)
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    pieces: list[str | Place] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url"):
            if speaker != HUMAN:
                raise SkipError("image part outside a question")
            pieces.append(Place(_part_name(part)))
        elif kind == "text" and isinstance(part.get("text"), str):
            pieces += _split(part["text"], tag) if speaker == HUMAN else [part["text"]]
        elif kind == "text" or not isinstance(kind, str):
            raise SkipError("a message has no text", shown(content))
        else:
            raise SkipError("part of a message is neither a text nor an image", shown(kind))
    return pieces


def _split(question: str, tag: re.Pattern[str]) -> list[str | Place]:
    texts = tag.split(question)
    pieces: list[str | Place] = [texts[0]]
    for text in texts[1:]:
        pieces += [Place(), text]
    return pieces


def _has_unread_tag(question: str, has_images: bool) -> bool:
    """Whether a question has a place of a video or an audio file."""
    found = list(_UNREAD_TAG.finditer(question))
    at_an_end = found and (found[0].start() == 0 or found[-1].end() == len(question))
    return bool(found and (has_images or at_an_end))


def _part_name(part: dict) -> Any:
    """The file or URL that an image part names, {"image_url": {"url": NAME}} or {"image": NAME}."""
    value = next((part[key] for key in _NAMES if part.get(key) is not None), None)
    if isinstance(value, dict):
        value = next((value[key] for key in _NAMES if value.get(key) is not None), value)
    return value
