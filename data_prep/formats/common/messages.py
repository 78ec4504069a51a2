"""Messages of a conversation: speakers, texts, and the places of images in questions.

A message is {from, value} as LLaVA and ShareGPT have it, or {role, content} as OpenAI has it,
whose content is a text or a list of parts.
"""

import re
from dataclasses import dataclass
from typing import Any

from data_prep.formats.common.inputs import SkipError, shown
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, strip_text

HUMAN, GPT, SYSTEM = "human", "gpt", "system"
_TAG = re.compile(f"<image>|{re.escape(IMAGE_PLACEHOLDER)}")  # LLaVA's tag and mPLUG-Owl2's
_SPEAKERS = {  # of LLaVA and ShareGPT, of OpenAI, and of collections of ShareGPT
    "human": HUMAN,
    "user": HUMAN,
    "gpt": GPT,
    "assistant": GPT,
    "chatgpt": GPT,
    "system": SYSTEM,
}
_ROLE = 20  # characters of an unknown speaker in a reason
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


def read_messages(messages: Any) -> list[Message]:
    """The messages of an entry; raises SkipError naming what they lack."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise SkipError("conversations is not a list of messages", shown(messages))
    return [Message(speaker, _pieces(m, speaker)) for m in messages for speaker in [_speaker(m)]]


def part_names(messages: Any) -> list[Any]:
    """The files that OpenAI parts name, whatever else is wrong with the messages."""
    found = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                found.append(_part_name(part))
    return found


def take_turns(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The messages from the first question to the last answer, and those that are dropped: answers
    before, a question without an answer after. Raises SkipError if they do not alternate."""
    speakers = [message.speaker for message in messages]
    first = speakers.index(HUMAN) if HUMAN in speakers else len(speakers)
    last = len(speakers) - (speakers[-1:] == [HUMAN])
    kept = speakers[first:last]
    if SYSTEM in speakers:
        raise SkipError("system turn after the first turn", ", ".join(speakers))
    if not kept:
        raise SkipError("no turns")
    if kept != [HUMAN, GPT] * (len(kept) // 2):
        raise SkipError("human and gpt do not take turns", ", ".join(speakers))
    return messages[first:last], messages[:first] + messages[last:]


def _speaker(message: dict) -> str:
    role = next((message[key] for key in ("from", "role") if message.get(key) is not None), None)
    speaker = _SPEAKERS.get(role.strip().lower()) if isinstance(role, str) else None
    if speaker is None:
        named = role[:_ROLE] if isinstance(role, str) else role
        raise SkipError(f"speaker {shown(named)} is neither human nor gpt")
    return speaker


def _pieces(message: dict, speaker: str) -> list[str | Place]:
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
            pieces += _split(part["text"]) if speaker == HUMAN else [part["text"]]
        else:
            raise SkipError("a message has no text", shown(content))
    return pieces


def _split(question: str) -> list[str | Place]:
    texts = _TAG.split(question)
    pieces: list[str | Place] = [texts[0]]
    for text in texts[1:]:
        pieces += [Place(), text]
    return pieces


def _part_name(part: dict) -> Any:
    """The file or URL that an image part names, {"image_url": {"url": NAME}} or {"image": NAME}."""
    value = next((part[key] for key in _NAMES if part.get(key) is not None), None)
    if isinstance(value, dict):
        value = next((value[key] for key in _NAMES if value.get(key) is not None), value)
    return value
