"""What one process does with one part: read and judge every sample, then note or store it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_owl2.data.images import decode
from megatron_owl2.data.records import BadSampleError, Record
from megatron_owl2.data.shards import ShardWriter
from megatron_owl2.preprocess import selection
from megatron_owl2.preprocess.filters import Facts, Filters, measure, number_columns
from megatron_owl2.preprocess.folder import Folder
from megatron_owl2.preprocess.parts import Part, PreprocessError, Skipped
from megatron_owl2.preprocess.pool import Tick
from megatron_owl2.preprocess.report import Tally
from megatron_owl2.preprocess.transform import Reencoding

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
    facts: Facts
    pixels: torch.Tensor | None


def scan_part(settings: Settings, folder: Folder, part: Part, tick: Tick) -> None:
    """The first of two readings: what stays by itself goes into a table for select()."""
    tally = Tally(settings.filters)
    rows = []
    for candidate in _examine(settings, part, tally, tick):
        record = candidate.record
        try:
            content = selection.content(record)
        except BadSampleError as error:
            tally.skip(_not_storable(record, error))
            continue
        rows.append(
            (
                content,
                selection.identity(record, part, settings.deduplicate),
                selection.priority(record, part, settings.seed),
                candidate.position,
            )
        )
    with folder.unfinished(part.name) as unfinished:
        np.save(unfinished / "rows.npy", np.array(rows, dtype=selection.ROW))
        folder.keep_scan(part, unfinished, tally.to_json())


def write_part(settings: Settings, folder: Folder, part: Part, tick: Tick) -> None:
    """The only reading, or the second: every record that stays goes into the part's shards."""
    tally = Tally(settings.filters)
    choose = _selected if settings.two_readings else _examine
    arguments = (folder,) if settings.two_readings else ()
    with folder.unfinished(part.name) as unfinished:
        shards = unfinished / "shards"
        writer = ShardWriter(shards, settings.samples_per_shard, part.name, manifest=False)
        with writer:
            for candidate in choose(settings, part, tally, tick, *arguments):
                record, facts = candidate.record, candidate.facts
                if candidate.pixels is not None:
                    image = settings.reencoding.encode(candidate.pixels)
                    record = replace(record, image=image)
                    facts = measure(record, settings.filters.score_names)
                try:
                    writer.write(record)
                except BadSampleError as error:
                    tally.skip(_not_storable(record, error))
                    continue
                tally.count("kept", facts)
        folder.keep_part(part, shards, {"rows": writer.rows} | tally.to_json())


def _examine(settings: Settings, part: Part, tally: Tally, tick: Tick) -> Iterator[_Candidate]:
    """The samples of a part that stay; the others are counted."""
    keys: set[str] = set()
    for position, item in enumerate(settings.read(part.payload)):
        tick(item)
        if isinstance(item, Record) and item.key in keys:
            item = Skipped("key occurs twice", item.key)
        if isinstance(item, Record):
            keys.add(item.key)
            item = _judge(settings, part, tally, item, position)
        if isinstance(item, Skipped):
            tally.skip(item)
        else:
            yield item


def _judge(
    settings: Settings, part: Part, tally: Tally, record: Record, position: int
) -> _Candidate | Skipped:
    """What is cheap to know comes first, so that few pictures are decoded in vain."""
    tally.columns.update(number_columns(record))
    if record.image is not None and not settings.reencoding.accepts(record.image):
        return Skipped("image is not JPEG, PNG or WebP", record.key)
    try:
        facts = measure(record, settings.filters.score_names)
    except BadSampleError as error:
        return Skipped("image cannot be read", f"{record.key}: {error}")
    tally.count("read", facts)
    refused = settings.filters.refuse(record, facts)
    if refused is not None:
        return refused
    if not settings.two_readings and settings.sample is not None:
        drawn = selection.priority(record, part, settings.seed)
        if not selection.below_fraction(drawn, settings.sample):
            return Skipped(_NOT_SAMPLED, record.key)
    try:
        change = record.image is not None and settings.reencoding.needed(record.image, facts.size)
    except BadSampleError as error:
        return Skipped(str(error), record.key)
    pixels = None
    if record.image is not None and (change or settings.filters.decode):
        try:
            pixels = decode(record.image)
        except BadSampleError as error:
            return Skipped("image cannot be decoded", f"{record.key}: {error}")
    return _Candidate(record, position, facts, pixels if change else None)


def _selected(
    settings: Settings, part: Part, tally: Tally, tick: Tick, folder: Folder
) -> Iterator[_Candidate]:
    """The second reading: what the selection keeps; the rest of the scan's records is counted."""
    rows, fates = np.load(folder.scan(part)), np.load(folder.fates(part))
    expected = zip(rows["position"].tolist(), rows["content"].tolist(), fates, strict=True)
    position, content, fate = next(expected, (None, None, None))
    for place, item in enumerate(settings.read(part.payload)):
        tick(item)
        if place != position:
            continue
        if not isinstance(item, Record) or selection.content(item) != content:
            break
        if fate == selection.KEEP:
            facts = measure(item, settings.filters.score_names)
            change = item.image is not None and settings.reencoding.needed(item.image, facts.size)
            yield _Candidate(item, place, facts, decode(item.image) if change else None)
        elif fate == selection.DUPLICATE:
            tally.skip(Skipped(_DUPLICATES[settings.deduplicate], item.key))
        else:
            tally.skip(Skipped(_NOT_SAMPLED, item.key))
        position, content, fate = next(expected, (None, None, None))
    if position is not None:
        raise PreprocessError(
            f"part {part.name}: sample {position + 1} is not what the first reading found; the "
            f"input changed: delete {folder.output} and start again"
        )


def _not_storable(record: Record, error: BadSampleError) -> Skipped:
    return Skipped("record cannot be stored", f"{record.key}: {error}")
