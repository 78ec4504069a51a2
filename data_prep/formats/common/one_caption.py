"""Captioning as an instruction: one caption of an image, drawn by the image's id, is the answer."""

from collections.abc import Sequence
from typing import Any, TypeVar

import xxhash

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


def captioning(caption: str) -> tuple[Turn, ...]:
    """The conversation that asks for a caption."""
    return (Turn(f"{IMAGE_PLACEHOLDER}{QUESTION}", caption),)
