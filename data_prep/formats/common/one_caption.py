"""Captioning as an instruction: one caption of an image, drawn by the image's id, is the answer."""

from collections.abc import Sequence
from typing import Any, TypeVar

import xxhash

from data_prep.formats.common.inputs import SkipError, caption
from megatron_owl2.data.sampling.keyed_random import combine
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Turn

_Value = TypeVar("_Value")
QUESTION = "Provide a one-sentence caption for the provided image."  # of the official evaluation


def key_of(name: Any) -> int:
    """64-bit number that depends on a name (an id, a path) alone."""
    return combine(xxhash.xxh3_64_intdigest(str(name).encode(errors="replace")))


def draw(name: Any, values: Sequence[_Value]) -> _Value:
    """One of the values, always the same for a name."""
    return values[key_of(name) % len(values)]


def draw_caption(name: Any, captions: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """One of an image's captions, each an id and a text, that can be used, always the same for the
    image's name.

    If none of them can be, it is any one, whose fault then says why the image is left out.
    """
    return draw(name, [entry for entry in captions if _is_usable(entry[1])] or captions)


def captioning(words: str) -> tuple[Turn, ...]:
    """The conversation that asks for a caption."""
    return (Turn(f"{IMAGE_PLACEHOLDER}{QUESTION}", words),)


def _is_usable(text: Any) -> bool:
    try:
        caption(text)
    except SkipError:
        return False
    return True
