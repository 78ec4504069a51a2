"""Filters of records: what is measured of each, and the limits that it must keep."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_owl2.data.images import image_size
from megatron_owl2.data.pillow_images import MAX_PIXELS, MAX_SIDE
from megatron_owl2.data.shards.records import Record


@dataclass(frozen=True)
class ImageStats:
    """Measurements of a record without decoding its images: (width, height) in pixels and bytes of
    each, characters of the caption or of all turns, scores."""

    sizes: tuple[tuple[int, int], ...]
    image_bytes: tuple[int, ...]
    characters: int
    scores: dict[str, float]

    @property
    def values(self) -> Iterator[tuple[str, float]]:
        """Pairs of a histogram of the report and this record's value."""
        yield "text length", self.characters
        for size, count in zip(self.sizes, self.image_bytes, strict=True):
            yield "smaller side", min(size)
            yield "aspect ratio", max(size) / min(size)
            yield "image bytes", count
        for name, value in self.scores.items():
            yield score_title(name), value


def score_title(name: str) -> str:
    """Name of a score's histogram."""
    return f"score {name}"


def measure(record: Record, score_names: set[str]) -> ImageStats:
    """Stats of a record; raises BadSampleError if an image's header cannot be read."""
    if record.caption is not None:
        characters = len(record.caption)
    else:
        characters = sum(len(turn.question) + len(turn.answer) for turn in record.turns)
    scores = {name: _number(record.metadata.get(name)) for name in score_names}
    return ImageStats(
        sizes=tuple(map(image_size, record.images)),
        image_bytes=tuple(map(len, record.images)),
        characters=characters,
        scores={name: value for name, value in sorted(scores.items()) if value is not None},
    )


def number_columns(record: Record) -> set[str]:
    """Names of a record's metadata that could be scores."""
    return {name for name, value in record.metadata.items() if _number(value) is not None}


@dataclass(frozen=True)
class Refusal:
    """Limit that a record breaks: the reason, what was measured, the number of the image (from 0)
    if it is one's, and whether the limit was chosen rather than that of decoding."""

    reason: str
    measured: str
    image: int | None = None
    chosen: bool = True


@dataclass(frozen=True)
class Filters:
    """Limits on images (sides in pixels, longer by shorter side), on captions (characters;
    conversations are left alone) and on named scores. With `decode` every image is decoded, so
    that a broken one is found; without it only its header is read."""

    min_side: int | None = None
    max_aspect: float | None = None
    min_caption: int | None = None
    max_caption: int | None = None
    min_score: dict[str, float] = field(default_factory=dict)
    max_score: dict[str, float] = field(default_factory=dict)
    decode: bool = True

    @property
    def score_names(self) -> set[str]:
        """Names of the scores that have a limit."""
        return self.min_score.keys() | self.max_score.keys()

    def refuse(self, record: Record, stats: ImageStats) -> Refusal | None:
        """First limit that a record breaks, or None."""
        return next(self._broken_limits(record, stats), None)

    def _broken_limits(self, record: Record, stats: ImageStats) -> Iterator[Refusal]:
        for number, size in enumerate(stats.sizes):
            shape = "{} x {} pixels".format(*size)
            if math.prod(size) > MAX_PIXELS or max(size) > MAX_SIDE:
                reason = f"more than {MAX_PIXELS} pixels, or a side above {MAX_SIDE}"
                yield Refusal(reason, shape, number, chosen=False)
            if self.min_side is not None and min(size) < self.min_side:
                yield Refusal(f"smaller side below {self.min_side} pixels", shape, number)
            aspect = max(size) / min(size)
            if self.max_aspect is not None and aspect > self.max_aspect:
                yield Refusal(f"aspect ratio above {self.max_aspect:g}", shape, number)
        if record.caption is not None:
            length = f"{stats.characters} characters"
            if self.min_caption is not None and stats.characters < self.min_caption:
                yield Refusal(f"caption below {self.min_caption} characters", length)
            if self.max_caption is not None and stats.characters > self.max_caption:
                yield Refusal(f"caption above {self.max_caption} characters", length)
        for name in sorted(self.score_names):
            value = stats.scores.get(name)
            if value is None:
                yield Refusal(f"no score {name}", f"it has {sorted(record.metadata)}")
            elif value < self.min_score.get(name, -math.inf):
                yield Refusal(f"{name} below {self.min_score[name]:g}", f"{value:g}")
            elif value > self.max_score.get(name, math.inf):
                yield Refusal(f"{name} above {self.max_score[name]:g}", f"{value:g}")


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer, such as a long identifier
        return None
    return number if math.isfinite(number) else None
