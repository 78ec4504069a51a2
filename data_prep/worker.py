"""Work of one process on one split: every sample is read and judged, then noted or stored."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from data_prep import dedup
from data_prep.corpus_statistics import StatisticsBuilder
from data_prep.filters import Filters, ImageStats, measure, number_columns
from data_prep.formats.common.inputs import SkipError, shown, skipped
from data_prep.job_state import JobState
from data_prep.reencode import Reencoding
from data_prep.split_pool import Tick
from data_prep.splits import InputSplit, Skipped
from megatron_owl2.data.image_files import kind, why_not_read
from megatron_owl2.data.images import decode, image_size
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.shards.writer import ShardWriter
from megatron_owl2.errors import BadSampleError, PreprocessError

_DUPLICATES = {"image": "duplicate image", "pair": "duplicate image and text"}
_NOT_SAMPLED = "not in the sample"
_LEFT_OUT: dict[int | None, str] = {
    dedup.NOT_SAMPLED: _NOT_SAMPLED,
    dedup.HELD_OUT: "held out",
    dedup.NOT_HELD_OUT: "not held out",
}


@dataclass(frozen=True)
class Settings:
    """Settings of a job: `read` is that of the format; `deduplicate` is None, "image" or "pair";
    `sample` a number of records (int), a fraction of them (float below 1) or None for all;
    `hold_out` a number of records that are left out first, and with them all others of just
    the same images; with `only_held_out` just these are kept, and `sample` is without effect.

    The names of the fields are the keys of job.json.
    """

    read: Callable[[Any], Iterator[Record | Skipped]]
    filters: Filters = Filters()
    reencoding: Reencoding = Reencoding()
    deduplicate: str | None = None
    sample: int | float | None = None
    seed: int = 0
    samples_per_shard: int = 10_000
    hold_out: int = 0
    only_held_out: bool = False

    @property
    def two_readings(self) -> bool:
        """Whether decisions about a record depend on other splits."""
        return self.deduplicate is not None or isinstance(self.sample, int) or self.hold_out > 0


@dataclass(frozen=True)
class _Candidate:
    """Record that stays so far, its position among the split's samples, and for each of its images
    the pixels (uint8 [3, H, W]) if it is to be encoded anew."""

    record: Record
    position: int
    stats: ImageStats
    pixels: tuple[torch.Tensor | None, ...]


def scan_split(settings: Settings, state: JobState, split: InputSplit, tick: Tick) -> None:
    """First of two readings: records that pass the filters go into a table for select()."""
    statistics = StatisticsBuilder(settings.filters)
    rows = []
    for candidate in _examine(settings, split, statistics, tick):
        record = candidate.record
        try:
            content = dedup.content(record)
        except BadSampleError as error:
            statistics.skip(_not_storable(split, record, error))
            continue
        rows.append(
            (
                content,
                dedup.identity(record, split, settings.deduplicate),
                dedup.priority(record, split, settings.seed, by_images=settings.hold_out > 0),
                candidate.position,
            )
        )
    with state.unfinished(split.name) as unfinished:
        np.save(unfinished / "rows.npy", np.array(rows, dtype=dedup.ROW))
        state.keep_scan(split, unfinished, statistics.to_json())


def write_split(settings: Settings, state: JobState, split: InputSplit, tick: Tick) -> None:
    """Only or second reading: every record that stays goes into the split's shards."""
    statistics = StatisticsBuilder(settings.filters)
    if settings.two_readings:
        candidates = _selected(settings, split, statistics, tick, state)
    else:
        candidates = _examine(settings, split, statistics, tick)
    with state.unfinished(split.name) as unfinished:
        shards = unfinished / "shards"
        writer = ShardWriter(shards, settings.samples_per_shard, split.name, manifest=False)
        with writer:
            for candidate in candidates:
                record, stats = candidate.record, candidate.stats
                if any(pixels is not None for pixels in candidate.pixels):
                    record = replace(record, images=_encoded(settings, candidate))
                    stats = measure(record, settings.filters.score_names)
                try:
                    writer.write(record)
                except BadSampleError as error:
                    statistics.skip(_not_storable(split, record, error))
                    continue
                statistics.count("kept", stats)
        state.keep_split(split, shards, {"rows": writer.rows} | statistics.to_json())


def _examine(
    settings: Settings, split: InputSplit, statistics: StatisticsBuilder, tick: Tick
) -> Iterator[_Candidate]:
    """Samples of a split that pass the filters; the others are counted."""
    keys: set[str] = set()
    for position, item in enumerate(settings.read(split.payload)):
        tick(item)
        if isinstance(item, Record) and item.key in keys:
            item = Skipped("key occurs twice", _where(split.origin.name, item))
        if isinstance(item, Record):
            keys.add(item.key)
            item = _judge(settings, split, statistics, item, position)
        if isinstance(item, Skipped):
            statistics.skip(item)
        else:
            yield item


def _judge(
    settings: Settings,
    split: InputSplit,
    statistics: StatisticsBuilder,
    record: Record,
    position: int,
) -> _Candidate | Skipped:
    """Decision about one record; cheap checks come first, to decode few images in vain."""
    statistics.columns.update(number_columns(record))
    where = partial(_where, split.origin.name, record)
    for number, image in enumerate(record.images):
        if not settings.reencoding.accepts(image):
            return skipped(_not_accepted(image), where(number))
    try:
        stats = measure(record, settings.filters.score_names)
    except BadSampleError as error:
        return Skipped("image cannot be read", f"{where(_first_unreadable(record))}: {error}")
    statistics.count("read", stats)
    refused = settings.filters.refuse(record, stats)
    if refused is not None:
        detail = f"{where(refused.image)}: {refused.measured}"
        return Skipped(refused.reason, detail, expected=refused.chosen)
    if isinstance(settings.sample, float) and not settings.two_readings:
        drawn = dedup.priority(record, split, settings.seed)
        if not dedup.below_fraction(drawn, settings.sample):
            return Skipped(_NOT_SAMPLED, where(), expected=True)
    pixels: list[torch.Tensor | None] = []
    for number, (image, size) in enumerate(zip(record.images, stats.sizes, strict=True)):
        try:
            pixels.append(_checked(settings, image, size))
        except SkipError as error:
            return skipped(error, where(number))
    return _Candidate(record, position, stats, tuple(pixels))


def _selected(
    settings: Settings,
    split: InputSplit,
    statistics: StatisticsBuilder,
    tick: Tick,
    state: JobState,
) -> Iterator[_Candidate]:
    """Records that the selection keeps; the rest of the scan's records is counted."""
    rows, decisions = np.load(state.scan(split)), np.load(state.keep_decisions(split))
    expected = zip(
        rows["position"].tolist(), rows["content"].tolist(), decisions.tolist(), strict=True
    )
    position, content, decision = next(expected, (None, None, None))
    for place, item in enumerate(settings.read(split.payload)):
        tick(item)
        if place != position:
            continue
        if not isinstance(item, Record) or dedup.content(item) != content:
            break
        if decision == dedup.KEEP:
            stats = measure(item, settings.filters.score_names)
            needed = map(settings.reencoding.needed, item.images, stats.sizes)
            pixels = [decode(i) if n else None for i, n in zip(item.images, needed, strict=True)]
            yield _Candidate(item, place, stats, tuple(pixels))
        elif decision == dedup.DUPLICATE:
            assert settings.deduplicate is not None  # or there would be no duplicates
            reason, where = _DUPLICATES[settings.deduplicate], _where(split.origin.name, item)
            statistics.skip(Skipped(reason, where, expected=True))
        else:
            where = _where(split.origin.name, item)
            statistics.skip(Skipped(_LEFT_OUT[decision], where, expected=True))
        position, content, decision = next(expected, (None, None, None))
    if position is not None:
        raise PreprocessError(
            f"split {split.name}: sample {position + 1} is not what the first reading found; the "
            f"input changed: delete {state.output} and start again"
        )


def _checked(settings: Settings, image: bytes, size: tuple[int, int]) -> torch.Tensor | None:
    """Pixels of an image that is to be encoded anew, None of one that is stored as it is; raises
    SkipError if JPEG cannot hold it, or if it is decoded in vain."""
    try:
        changes = settings.reencoding.needed(image, size)
    except BadSampleError as error:
        raise SkipError(str(error)) from None
    try:
        decoded = decode(image) if changes or settings.filters.decode else None
    except BadSampleError as error:
        reason = "image cannot be decoded"
        raise SkipError(reason, str(error).removeprefix(f"{reason}: ")) from None
    return decoded if changes else None


def _encoded(settings: Settings, candidate: _Candidate) -> tuple[bytes, ...]:
    """The images of a record, those with pixels encoded anew."""
    pairs = zip(candidate.record.images, candidate.pixels, strict=True)
    encode = settings.reencoding.encode
    return tuple(image if pixels is None else encode(pixels) for image, pixels in pairs)


def _where(file: str, record: Record, image: int | None = None) -> str:
    """Place of a record that is left out: file of the input, key, id and, if it has several images,
    the number of the one (from 0) that it is left out for."""
    named = [file, f"key {record.key}"]
    if "id" in record.metadata:
        named.append(f"id {shown(record.metadata['id'])}")
    if image is not None and len(record.images) > 1:
        named.append(f"image {image + 1} of {len(record.images)}")
    return ", ".join(named)


def _first_unreadable(record: Record) -> int | None:
    """Number of the first image whose header cannot be read."""
    for number, image in enumerate(record.images):
        try:
            image_size(image)
        except BadSampleError:
            return number
    return None


def _not_accepted(image: bytes) -> SkipError:
    """Reason why shards do not hold an image of its kind."""
    reason = "image is not JPEG, PNG or WebP"
    if name := kind(image):
        return SkipError(f"{reason} (--max-side or --jpeg-quality stores it as JPEG)", name)
    return SkipError(reason, why_not_read(image))


def _not_storable(split: InputSplit, record: Record, error: BadSampleError) -> Skipped:
    return Skipped("record cannot be stored", f"{_where(split.origin.name, record)}: {error}")
