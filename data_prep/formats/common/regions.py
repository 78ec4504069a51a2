"""Regions of an image as questions: from a phrase to its box, and from a box to a phrase.

A box is written `[x1, y1, x2, y2]`: left, top, right and bottom as shares of the image's own width
and height with three decimals. So it does not depend on whether the image is padded or squashed to
the model's square.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.formats.common.inputs import SkipError, shown
from data_prep.formats.common.one_caption import draw, key_of
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Turn

_FIND = (
    "Where in the image is this: {}? Answer with a bounding box.",
    "Give the bounding box of what this phrase refers to: {}",
    "Find this in the image and answer with its bounding box: {}",
    "Which region of the image fits this description: {}? Answer with a bounding box.",
)
_DESCRIBE = (
    "What is in the region {} of the image? Answer with a short phrase.",
    "Describe the region {} with a short phrase.",
    "Give a short phrase for what the bounding box {} holds.",
    "Which phrase refers to the region {}?",
)


@dataclass(frozen=True)
class Region:
    """Region of an image: a name that is its own in the data set, a phrase, its box as text."""

    name: str
    phrase: str
    box: str


def read_region(name: str, phrase: Any, box: Sequence[Any], size: tuple[Any, Any]) -> Region:
    """Region of an image of `size` (width, height), with its box (left, top, width, height); both
    in pixels.

    White space in the phrase becomes single spaces, punctuation marks at its end go. A box is
    clipped to the image. Raises SkipError for an empty phrase, and for a box that is empty, lies
    outside or is too thin to be written.
    """
    words = " ".join(phrase.split()).rstrip(".,;:?! ") if isinstance(phrase, str) else ""
    if not words:
        raise SkipError("region without a phrase", shown(phrase))
    return Region(name, words, _box_text(box, size))


def questions(regions: Iterable[Region]) -> tuple[Turn, ...]:
    """Turns about regions of one image, which comes first; a region's name decides which way it is
    asked about, and how."""
    turns = [_turn(region) for region in regions]
    return (Turn(IMAGE_PLACEHOLDER + turns[0].question, turns[0].answer), *turns[1:])


def shuffled(regions: Iterable[Region]) -> list[Region]:
    """Regions in an order that depends on their names alone, so that the boxes and phrases of one
    object, which are neighbours in the files, seldom answer each other."""
    return sorted(regions, key=lambda region: (key_of(region.name), region.name))


def one_of_each_phrase(regions: Iterable[Region]) -> list[Region]:
    """Regions of one image, shuffled; of those with the same phrase, in capitals or not, the first
    alone, since the phrase does not say which of them it refers to."""
    by_phrase: dict[str, Region] = {}
    for region in shuffled(regions):
        by_phrase.setdefault(region.phrase.casefold(), region)
    return list(by_phrase.values())


def _turn(region: Region) -> Turn:
    if key_of(f"direction of {region.name}") % 2:
        return Turn(draw(region.name, _FIND).format(region.phrase), region.box)
    return Turn(draw(region.name, _DESCRIBE).format(region.box), region.phrase)


def _box_text(box: Sequence[Any], size: tuple[Any, Any]) -> str:
    numbers = [*box, *size]
    if len(box) != 4 or not all(_is_number(number) for number in numbers):
        raise SkipError("box is not four numbers of pixels", shown(list(box)))
    left, top, width, height = box
    edges = []
    for start, length, side in ((left, width, size[0]), (top, height, size[1])):
        low, high = max(0, start), min(start + length, side)  # in this order -0.0 becomes 0
        if side <= 0 or high <= low:
            raise SkipError("box is empty or outside the image", f"{list(box)} in {size}")
        edges.append((f"{low / side:.3f}", f"{high / side:.3f}"))
    (x1, x2), (y1, y2) = edges
    if x1 == x2 or y1 == y2:
        raise SkipError("box is too thin for three decimals", f"{list(box)} in {size}")
    return f"[{x1}, {y1}, {x2}, {y2}]"


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max
