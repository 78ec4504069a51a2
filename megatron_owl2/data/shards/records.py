"""Record of a sample, before shards and after: images, and a caption or a conversation."""

import codecs
import json
import re
from collections.abc import Collection, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from megatron_owl2.data.image_files import kind, why_not_read
from megatron_owl2.errors import BadSampleError
from megatron_owl2.utils.json_text import parse_json

IMAGE_PLACEHOLDER = "<|image|>"  # stands for an image in a question; the official spelling

KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")  # webdataset ends a key at the first dot, ustar at 100
_IMAGES, _TEXTS = {"jpg", "jpeg", "png", "webp"}, {"json", "txt"}
_SURROGATE = re.compile("[\ud800-\udfff]")  # for a byte that is not UTF-8; UTF-8 cannot hold it
_NUMBERED = re.compile(r"(0|[1-9]\d{0,3})\.([a-z]+)")  # the extension of one of several images
COMMON_FIELDS = {"source", "metadata"}  # in the .json member of a record
FIELDS = COMMON_FIELDS | {"caption", "turns", "system"}


@dataclass(frozen=True)
class Turn:
    """One question and its answer; a placeholder in the question is the place of an image."""

    question: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One sample: `images` are encoded JPEGs, PNGs or WebPs; caption or turns, never both.

    The placeholders in the questions are the places of the images, in order. Without any
    placeholder all images come before the first question. In a record without an image, in a
    caption and in an answer a placeholder is text. A caption has one image, or none and is plain
    text. `system` is what comes before the first turn.
    Raises BadSampleError if its members contradict each other.
    """

    key: str
    images: tuple[bytes, ...] = ()
    caption: str | None = None
    turns: tuple[Turn, ...] = ()
    system: str = ""
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if (self.caption is None) == (not self.turns):
            raise BadSampleError("exactly one of caption and turns must be present")
        if not isinstance(self.source, str) or not isinstance(self.metadata, dict):
            raise BadSampleError("source must be a text and metadata a dictionary")
        _check_text("system", self.system, may_be_empty=True)
        if self.caption is not None:
            _check_text("caption", self.caption)
            if self.system:
                raise BadSampleError("a caption with a system text")
            if len(self.images) > 1:
                raise BadSampleError(f"a caption of {len(self.images)} images")
        for index, turn in enumerate(self.turns):
            image_alone = index == 0 and bool(self.images)  # may be the whole question
            _check_text(f"question {index + 1}", turn.question, may_be_empty=image_alone)
            _check_text(f"answer {index + 1}", turn.answer)
        placeholders = sum(turn.question.count(IMAGE_PLACEHOLDER) for turn in self.turns)
        if self.images and placeholders not in (0, len(self.images)):
            raise BadSampleError(
                f"{placeholders} placeholders {IMAGE_PLACEHOLDER} for {len(self.images)} images"
            )

    def questions(self) -> list[list[str]]:
        """The texts of each question, between which its images stand: one more than these."""
        texts = [turn.question for turn in self.turns]
        if not self.images:
            return [[text] for text in texts]
        pieces = [text.split(IMAGE_PLACEHOLDER) for text in texts]
        if pieces and all(len(piece) == 1 for piece in pieces):
            pieces[0] = [*[""] * len(self.images), texts[0]]
        return pieces

    def to_members(self) -> list[tuple[str, bytes]]:
        """The shard members as (file name, bytes): the images first, then `<key>.json`.

        One image is `<key>.jpg`, of several the first `<key>.0.jpg`, or as their types ask. Raises
        BadSampleError for a key with other characters than letters, digits, `_`, `-`, an image that
        is not JPEG, PNG or WebP, or metadata that JSON cannot hold. Lone surrogates in source and
        metadata are escaped with a backslash, which is text.
        """
        if not KEY.fullmatch(self.key):
            raise BadSampleError(
                f"key {self.key!r}: use 1 to 90 letters, digits, '_' and '-' (a dot ends the key)"
            )
        members = []
        for number, image in enumerate(self.images):
            stem = f"{self.key}.{number}" if len(self.images) > 1 else self.key
            members.append((f"{stem}.{image_extension(image)}", image))
        body: dict[str, Any]
        if self.caption is not None:
            body = {"caption": self.caption}
        else:
            body = {"turns": [{"question": t.question, "answer": t.answer} for t in self.turns]}
        if self.system:
            body["system"] = self.system
        body |= {"source": self.source, "metadata": self.metadata}
        try:
            text = json.dumps(
                body, ensure_ascii=False, sort_keys=True, allow_nan=False, separators=(",", ":")
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise BadSampleError(f"source or metadata is not valid JSON: {error}") from None
        text = _SURROGATE.sub(lambda found: rf"\\u{ord(found[0]):04x}", text)
        return [*members, (f"{self.key}.json", text.encode())]

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
        images = tuple(members[extension] for extension in _images(members.keys()))
        body = _json(members["json"]) if "json" in members else {}
        try:
            if "txt" in members or not body.keys() <= FIELDS:
                if len(images) != 1:
                    raise BadSampleError("a caption of several images" if images else "no image")
                text = decode_text(members["txt"]) if "txt" in members else body["caption"]
                if "\0" in text:
                    raise BadSampleError("caption holds zero bytes: text in UTF-16 or UTF-32?")
                return cls(key=key, images=images, caption=strip_text(text), metadata=body)
            return cls(
                key=key,
                images=images,
                caption=body.get("caption"),
                turns=tuple(Turn(t["question"], t["answer"]) for t in body.get("turns", ())),
                system=body.get("system", ""),
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

    Images are looked at only as far as their first bytes.
    """
    try:
        record = Record._from_members(key, members)
        for image in record.images:
            if kind(image) is None:
                return f"image cannot be decoded: {why_not_read(image)}"
    except BadSampleError as error:
        return str(error)
    return None


def _images(extensions: Collection[str]) -> list[str]:
    """The extensions of images in their order: one of _IMAGES, or numbered ones such as 0.jpg."""
    numbers = {e: int(m[1]) for e in extensions if (m := _NUMBERED.fullmatch(e))}
    alone = [e for e in extensions if e in _IMAGES]
    return alone + sorted((e for e in numbers if _type(e) in _IMAGES), key=numbers.__getitem__)


def _type(extension: str) -> str:
    return extension.rpartition(".")[2]


def _unfit(extensions: Set[str]) -> str | None:
    """Why members with these extensions cannot be a record, or None if they can: images with .txt
    or .json, or .json alone."""
    images, texts = _images(extensions), extensions & _TEXTS
    if len(images) + len(texts) < len(extensions):
        unknown = min(extensions - {*images} - texts)
        if _type(unknown) in _IMAGES | _TEXTS:
            return "a name with several dots, of which training reads the first as its end"
        return "a member that is neither an image (jpg, jpeg, png or webp) nor txt nor json"
    numbered = [e for e in images if e not in _IMAGES]
    if len(images) - len(numbered) > 1 or (numbered and len(numbered) < len(images)):
        return "more than one image"
    if [int(e.partition(".")[0]) for e in numbered] != [*range(len(numbered))]:
        return "images whose numbers are not 0, 1 and so on"
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
