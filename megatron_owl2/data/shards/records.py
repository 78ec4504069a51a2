"""Record of a sample, before shards and after: at most one image, a caption or a conversation."""

import codecs
import json
import re
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from megatron_owl2.data.image_files import kind, why_not_read
from megatron_owl2.errors import BadSampleError
from megatron_owl2.utils.json_text import parse_json

IMAGE_PLACEHOLDER = "<|image|>"  # stands for the image in a question; the official spelling

KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")  # webdataset ends a key at the first dot, ustar at 100
_IMAGES, _TEXTS = {"jpg", "jpeg", "png", "webp"}, {"json", "txt"}
_FIELDS = {"caption", "turns", "source", "metadata"}


@dataclass(frozen=True)
class Turn:
    """One question and its answer; the placeholder may stand in the first question of a record."""

    question: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One sample: `image` holds an encoded JPEG, PNG or WebP; caption or turns, never both.

    A caption without an image is plain text. Raises BadSampleError if its members contradict each
    other: a record has one image at most, so at most one placeholder, in the first question.
    """

    key: str
    image: bytes | None = None
    caption: str | None = None
    turns: tuple[Turn, ...] = ()
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if (self.caption is None) == (not self.turns):
            raise BadSampleError("exactly one of caption and turns must be present")
        if not isinstance(self.source, str) or not isinstance(self.metadata, dict):
            raise BadSampleError("source must be a text and metadata a dictionary")
        if self.caption is not None:
            _check_text("caption", self.caption)
            if IMAGE_PLACEHOLDER in self.caption:
                raise BadSampleError(f"{IMAGE_PLACEHOLDER} inside a caption")
        for index, turn in enumerate(self.turns):
            image_alone = index == 0 and self.image is not None  # may be the whole question
            _check_text(f"question {index + 1}", turn.question, may_be_empty=image_alone)
            _check_text(f"answer {index + 1}", turn.answer)
            placeholders = turn.question.count(IMAGE_PLACEHOLDER)
            if placeholders > 1:
                raise BadSampleError(
                    f"{placeholders} placeholders {IMAGE_PLACEHOLDER} for at most one image"
                )
            if placeholders and self.image is None:
                raise BadSampleError(f"{IMAGE_PLACEHOLDER} without an image")
            if placeholders and index > 0:
                raise BadSampleError(f"{IMAGE_PLACEHOLDER} outside the first question")
            if IMAGE_PLACEHOLDER in turn.answer:
                raise BadSampleError(f"{IMAGE_PLACEHOLDER} inside an answer")

    def to_members(self) -> list[tuple[str, bytes]]:
        """The shard members as (file name, bytes): the image first, then `<key>.json`.

        Raises BadSampleError for a key with other characters than letters, digits, `_`, `-`, an
        image that is not JPEG, PNG or WebP, or metadata that JSON cannot hold.
        """
        if not KEY.fullmatch(self.key):
            raise BadSampleError(
                f"key {self.key!r}: use 1 to 90 letters, digits, '_' and '-' (a dot ends the key)"
            )
        members = []
        if self.image is not None:
            members.append((f"{self.key}.{image_extension(self.image)}", self.image))
        if self.caption is not None:
            body = {"caption": self.caption}
        else:
            body = {"turns": [{"question": t.question, "answer": t.answer} for t in self.turns]}
        body |= {"source": self.source, "metadata": self.metadata}
        try:
            text = json.dumps(
                body, ensure_ascii=False, sort_keys=True, allow_nan=False, separators=(",", ":")
            ).encode()
        except (TypeError, ValueError) as error:
            raise BadSampleError(f"source or metadata is not valid JSON: {error}") from None
        return [*members, (f"{self.key}.json", text)]

    @classmethod
    def from_members(cls, key: str, members: Mapping[str, bytes]) -> "Record":
        """Rebuild a record from its members, extension to bytes.

        Reads what to_members made, and image-text pairs as webdataset corpora are published: an
        image with its caption in .txt or in the `caption` of .json (img2dataset writes both).
        Raises BadSampleError if a member is missing, unknown or malformed.
        """
        try:
            return cls._from_members(key, members)
        except BadSampleError as error:
            names = ", ".join(f".{extension}" for extension in sorted(members))
            raise BadSampleError(f"sample {key!r} ({names}): {error}") from None

    @classmethod
    def _from_members(cls, key: str, members: Mapping[str, bytes]) -> "Record":
        """The record; errors are categories, without its key."""
        if reason := _unfit(members.keys()):
            raise BadSampleError(reason)
        images = [extension for extension in members if extension in _IMAGES]
        image = members[images[0]] if images else None
        body = _json(members["json"]) if "json" in members else {}
        try:
            if "txt" in members or not body.keys() <= _FIELDS:
                if image is None:
                    raise BadSampleError("no image")
                text = decode_text(members["txt"]) if "txt" in members else body["caption"]
                if "\0" in text:
                    raise BadSampleError("caption holds zero bytes: text in UTF-16 or UTF-32?")
                return cls(key=key, image=image, caption=strip_text(text), metadata=body)
            return cls(
                key=key,
                image=image,
                caption=body.get("caption"),
                turns=tuple(Turn(t["question"], t["answer"]) for t in body.get("turns", ())),
                source=body.get("source", ""),
                metadata=body.get("metadata", {}),
            )
        except (TypeError, KeyError, AttributeError):
            raise BadSampleError(
                "its .json member lacks a value or has one of the wrong type"
            ) from None


def _json(data: bytes) -> dict:
    try:
        body = parse_json(data)
    except ValueError:
        raise BadSampleError("its .json member is not JSON") from None
    if not isinstance(body, dict):
        raise BadSampleError("its .json member is not an object")
    return body


def why_unusable(key: str, members: Mapping[str, bytes]) -> str | None:
    """Why training cannot use a sample of another program, or None if it can; a category.

    The image is looked at only as far as its first bytes.
    """
    try:
        record = Record._from_members(key, members)
        if record.image is not None and kind(record.image) is None:
            return f"image cannot be decoded: {why_not_read(record.image)}"
    except BadSampleError as error:
        return str(error)
    return None


def _unfit(extensions: Set[str]) -> str | None:
    """Why members with these extensions cannot be a record, or None if they can: an image with .txt
    or .json, or .json alone."""
    images, texts = extensions & _IMAGES, extensions & _TEXTS
    if len(images) + len(texts) < len(extensions):
        unknown = min(extensions - images - texts)
        if unknown.rpartition(".")[2] in _IMAGES | _TEXTS:
            return "a name with several dots, of which training reads the first as its end"
        return "a member that is neither an image (jpg, jpeg, png or webp) nor txt nor json"
    if len(images) > 1:
        return "more than one image"
    if not images and extensions != {"json"}:
        return "no image (jpg, jpeg, png or webp)"
    return None if texts else "no txt or json"


def decode_text(data: bytes) -> str:
    """Text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; the mark is dropped.

    Other bytes become lone surrogates, which no record may hold.
    """
    if data[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        with suppress(UnicodeDecodeError):
            return data.decode("utf-32")
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        with suppress(UnicodeDecodeError):
            return data.decode("utf-16")
    return data.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")


def strip_text(text: str) -> str:
    """Text without the white space and byte order marks around it."""
    return text.strip().strip("\ufeff").strip()


def image_extension(data: bytes) -> str:
    """`jpg`, `png` or `webp` by the first bytes; raises BadSampleError for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise BadSampleError("image is not JPEG, PNG or WebP")


def _check_text(name: str, text: str, may_be_empty: bool = False) -> None:
    if not isinstance(text, str):
        raise BadSampleError(f"{name} is not a text")
    if not may_be_empty and (not text or text.isspace()):
        raise BadSampleError(f"{name} is empty")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadSampleError(f"{name} is not valid Unicode") from None
