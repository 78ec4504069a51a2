"""What one process does with one part: read and judge every sample, then note or store it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from data_prep import dedup
from data_prep.corpus_statistics import StatisticsBuilder
from data_prep.filters import Filters, ImageStats, measure, number_columns
from data_prep.job_state import JobState
from data_prep.pool import Tick
from data_prep.reencode import Reencoding
from data_prep.splits import InputSplit, Skipped
from megatron_owl2.data.images import decode
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.shards.writer import ShardWriter
from megatron_owl2.errors import BadSampleError, PreprocessError

_DUPLICATES = {"image": "duplicate image", "pair": "duplicate image and text"}
_NOT_SAMPLED = "not in the sample"


@dataclass(frozen=True)
class Settings:
    """What becomes of a corpus: `read` is its reader; `deduplicate` is None, "image" or "pair";
    `sample` a number of records (int), a fraction of them (float below 1) or None for all."""

    read: Callable[[Any], Iterator[Record | Skipped]]
    filters: Filters = Filters()
    reencoding: Reencoding = Reencoding()
    deduplicate: str | None = None
    sample: int | float | None = None
    seed: int = 0
    samples_per_shard: int = 10_000

    @property
    def two_readings(self) -> bool:
        """Whether a record's fate depends on other parts."""
        return self.deduplicate is not None or isinstance(self.sample, int)


@dataclass(frozen=True)
class _Candidate:
    """A record that stays so far, the place of it among its part's samples, and its picture's
    pixels (uint8 [3, H, W]) if it is to be encoded anew."""

    record: Record
    position: int
    stats: ImageStats
    pixels: torch.Tensor | None


def scan_split(settings: Settings, folder: JobState, part: InputSplit, tick: Tick) -> None:
    """The first of two readings: what stays by itself goes into a table for select()."""
    statistics = StatisticsBuilder(settings.filters)
    rows = []
    for candidate in _examine(settings, part, statistics, tick):
        record = candidate.record
        try:
            content = dedup.content(record)
        except BadSampleError as error:
            statistics.skip(_not_storable(record, error))
            continue
        rows.append(
            (
                content,
                dedup.identity(record, part, settings.deduplicate),
                dedup.priority(record, part, settings.seed),
                candidate.position,
            )
        )
    with folder.unfinished(part.name) as unfinished:
        np.save(unfinished / "rows.npy", np.array(rows, dtype=dedup.ROW))
        folder.keep_scan(part, unfinished, statistics.to_json())


def write_split(settings: Settings, folder: JobState, part: InputSplit, tick: Tick) -> None:
    """The only reading, or the second: every record that stays goes into the part's shards."""
    statistics = StatisticsBuilder(settings.filters)
    choose = _selected if settings.two_readings else _examine
    arguments = (folder,) if settings.two_readings else ()
    with folder.unfinished(part.name) as unfinished:
        shards = unfinished / "shards"
        writer = ShardWriter(shards, settings.samples_per_shard, part.name, manifest=False)
        with writer:
            for candidate in choose(settings, part, statistics, tick, *arguments):
                record, stats = candidate.record, candidate.stats
                if candidate.pixels is not None:
                    image = settings.reencoding.encode(candidate.pixels)
                    record = replace(record, image=image)
                    stats = measure(record, settings.filters.score_names)
                try:
                    writer.write(record)
                except BadSampleError as error:
                    statistics.skip(_not_storable(record, error))
                    continue
                statistics.count("kept", stats)
        folder.keep_split(part, shards, {"rows": writer.rows} | statistics.to_json())


def _examine(
    settings: Settings, part: InputSplit, statistics: StatisticsBuilder, tick: Tick
) -> Iterator[_Candidate]:
    """The samples of a part that stay; the others are counted."""
    keys: set[str] = set()
    for position, item in enumerate(settings.read(part.payload)):
        tick(item)
        if isinstance(item, Record) and item.key in keys:
            item = Skipped("key occurs twice", item.key)
        if isinstance(item, Record):
            keys.add(item.key)
            item = _judge(settings, part, statistics, item, position)
        if isinstance(item, Skipped):
            statistics.skip(item)
        else:
            yield item


def _judge(
    settings: Settings,
    part: InputSplit,
    statistics: StatisticsBuilder,
    record: Record,
    position: int,
) -> _Candidate | Skipped:
    """What is cheap to know comes first, so that few pictures are decoded in vain."""
    statistics.columns.update(number_columns(record))
    if record.image is not None and not settings.reencoding.accepts(record.image):
        return Skipped("image is not JPEG, PNG or WebP", record.key)
    try:
        stats = measure(record, settings.filters.score_names)
    except BadSampleError as error:
        return Skipped("image cannot be read", f"{record.key}: {error}")
    statistics.count("read", stats)
    refused = settings.filters.refuse(record, stats)
    if refused is not None:
        return refused
    if not settings.two_readings and settings.sample is not None:
        drawn = dedup.priority(record, part, settings.seed)
        if not dedup.below_fraction(drawn, settings.sample):
            return Skipped(_NOT_SAMPLED, record.key)
    try:
        change = record.image is not None and settings.reencoding.needed(record.image, stats.size)
    except BadSampleError as error:
        return Skipped(str(error), record.key)
    pixels = None
    if record.image is not None and (change or settings.filters.decode):
        try:
            pixels = decode(record.image)
        except BadSampleError as error:
            return Skipped("image cannot be decoded", f"{record.key}: {error}")
    return _Candidate(record, position, stats, pixels if change else None)


def _selected(
    settings: Settings,
    part: InputSplit,
    statistics: StatisticsBuilder,
    tick: Tick,
    folder: JobState,
) -> Iterator[_Candidate]:
    """The second reading: what the selection keeps; the rest of the scan's records is counted."""
    rows, keep_decisions = np.load(folder.scan(part)), np.load(folder.keep_decisions(part))
    expected = zip(rows["position"].tolist(), rows["content"].tolist(), keep_decisions, strict=True)
    position, content, fate = next(expected, (None, None, None))
    for place, item in enumerate(settings.read(part.payload)):
        tick(item)
        if place != position:
            continue
        if not isinstance(item, Record) or dedup.content(item) != content:
            break
        if fate == dedup.KEEP:
            stats = measure(item, settings.filters.score_names)
            change = item.image is not None and settings.reencoding.needed(item.image, stats.size)
            yield _Candidate(item, place, stats, decode(item.image) if change else None)
        elif fate == dedup.DUPLICATE:
            statistics.skip(Skipped(_DUPLICATES[settings.deduplicate], item.key))
        else:
            statistics.skip(Skipped(_NOT_SAMPLED, item.key))
        position, content, fate = next(expected, (None, None, None))
    if position is not None:
        raise PreprocessError(
            f"part {part.name}: sample {position + 1} is not what the first reading found; the "
            f"input changed: delete {folder.output} and start again"
        )


def _not_storable(record: Record, error: BadSampleError) -> Skipped:
    return Skipped("record cannot be stored", f"{record.key}: {error}")
