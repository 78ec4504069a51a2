"""Deduplication, held-out records and sampling: decisions that depend on all records of the corpus.

The first reading of every split leaves a table of its records (ROW). From the tables of all splits,
in the order of the corpus, one process decides about every record. It needs a byte for each record
and, whatever their number, about 3 GB more.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from xxhash import xxh3_64_intdigest, xxh3_128_intdigest

from data_prep.splits import InputSplit
from megatron_owl2.data.sampling.keyed_random import combine
from megatron_owl2.data.shards.records import Record

# Hashes of all of the record (content) and of what duplicates share (identity), priority in the
# draw of the sample, position among the split's samples.
ROW = np.dtype(
    [("content", "<u8"), ("identity", "<u8", 2), ("priority", "<u8"), ("position", "<u4")]
)
KEEP, DUPLICATE, NOT_SAMPLED, HELD_OUT, NOT_HELD_OUT = range(5)
_ROWS_AT_ONCE = 1 << 25
_ANY_JPEG = b"\xff\xd8\xff"

Table = Callable[[], np.ndarray]  # loads the rows of a split


def content(record: Record) -> int:
    """64-bit hash of everything in a record; raises BadSampleError if it cannot be stored even
    with other images."""
    stand_in = replace(record, images=(_ANY_JPEG,) * len(record.images))
    name, text = stand_in.to_members()[-1]
    return combine(*map(xxh3_64_intdigest, (name.encode(), text, *record.images)))


def identity(record: Record, split: InputSplit, deduplicate: str | None) -> tuple[int, int]:
    """128-bit hash that duplicates share, as two halves: of the images' bytes ("image"), or of
    images and text ("pair"). For "image" a record without an image is like no other."""
    if deduplicate is None:
        return 0, 0
    lengths = b"".join(len(image).to_bytes(8) for image in record.images[1:])
    image = b"".join(record.images) + lengths
    if deduplicate == "pair":
        text = (record.system + repr(record.turns or record.caption)).encode()
        value = xxh3_128_intdigest(image, seed=xxh3_64_intdigest(text))
    elif not record.images:
        value = xxh3_128_intdigest(_place(record, split), seed=1)
    else:
        value = xxh3_128_intdigest(image)
    return value >> 64, value & (1 << 64) - 1


def priority(record: Record, split: InputSplit, seed: int, by_images: bool = False) -> int:
    """64-bit priority of a record; those with the smallest ones are the sample.

    It depends on the seed, the split's name and the record's key, so neither filters nor the number
    of processes or partitions change it. `by_images`: on the seed and the bytes of the images in
    their order, if there are any, so that all records of just the same images have the same.
    """
    if by_images and record.images:
        return combine(seed, *map(xxh3_64_intdigest, record.images))
    return combine(seed, xxh3_64_intdigest(_place(record, split)))


def below_fraction(value: int, fraction: float) -> bool:
    """Whether a priority is in the sample of a fraction of the corpus."""
    return value < math.ldexp(fraction, 64)


def _place(record: Record, split: InputSplit) -> bytes:
    return f"{split.name}/{record.key}".encode(errors="backslashreplace")


def select(
    tables: Sequence[Table],
    deduplicate: bool,
    sample: int | float | None,
    rows_at_once: int = _ROWS_AT_ONCE,
    hold_out: int = 0,
    only_held_out: bool = False,
) -> Iterator[np.ndarray]:
    """Decisions (KEEP and reasons not to; uint8 [rows]) about the rows of every table.

    Of duplicates the first stays. Of the rest, the `hold_out` records with the largest priorities,
    and those equal to the least of them, go or, with `only_held_out`, stay alone and all. Of those
    that are not held out, `sample` keeps exactly that many, or about that fraction.
    """
    sizes = [len(table()) for table in tables]
    starts = np.cumsum([0, *sizes])
    keep_decisions = np.full(starts[-1], KEEP, dtype=np.uint8)
    if deduplicate:
        _find_duplicates(tables, starts, keep_decisions, rows_at_once)
    if hold_out:
        _hold_out(tables, starts, keep_decisions, hold_out)
    if only_held_out:
        keep_decisions[keep_decisions == KEEP] = NOT_HELD_OUT
        keep_decisions[keep_decisions == HELD_OUT] = KEEP
    elif sample is not None:
        _draw(tables, starts, keep_decisions, sample)
    for start, stop in zip(starts, starts[1:], strict=False):
        yield keep_decisions[start:stop]


def _find_duplicates(tables, starts, keep_decisions, rows_at_once) -> None:
    """Search for equal hashes, among one residue class of the first half at a time."""
    passes = np.uint64(-(-len(keep_decisions) // rows_at_once))
    for turn in range(int(passes)):
        found = []
        for table, start in zip(tables, starts, strict=False):
            hashes = table()["identity"]
            rows = np.flatnonzero(hashes[:, 0] % passes == turn)
            found.append((hashes[rows, 0], hashes[rows, 1], rows + start))
        high, low, rows = map(np.concatenate, zip(*found, strict=True))
        order = np.lexsort((low, high))  # stable, so the first of equal ones comes first
        high, low = high[order], low[order]
        again = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        keep_decisions[rows[order[1:][again]]] = DUPLICATE


def _hold_out(tables, starts, keep_decisions, count: int) -> None:
    """Decision HELD_OUT for the `count` largest priorities and those equal to the least of them."""
    rest = max(0, int(np.count_nonzero(keep_decisions == KEEP)) - count)
    limit, _ = _limit(tables, starts, keep_decisions, rest + 1)  # the least that is held out
    for table, start, stop in zip(tables, starts, starts[1:], strict=False):
        mine = keep_decisions[start:stop]
        mine[(mine == KEEP) & (table()["priority"] >= limit)] = HELD_OUT


def _draw(tables, starts, keep_decisions, sample: int | float) -> None:
    """Draw of the smallest priorities; of those equal to the limit, the first are kept."""
    if isinstance(sample, float):
        limit, at_limit = int(math.ldexp(sample, 64)), 0
    else:
        limit, at_limit = _limit(tables, starts, keep_decisions, sample)
    for table, start, stop in zip(tables, starts, starts[1:], strict=False):
        priorities, mine = table()["priority"], keep_decisions[start:stop]
        stay = priorities < limit
        equal = np.flatnonzero((priorities == limit) & (mine == KEEP))[:at_limit]
        stay[equal] = True
        at_limit -= len(equal)
        mine[(mine == KEEP) & ~stay] = NOT_SAMPLED


def _limit(tables, starts, keep_decisions, sample: int) -> tuple[int, int]:
    """Largest priority in the sample, and the number of records with just this one in it.

    The upper 16 bits are counted first, so that only one of 65,536 classes must be sorted.
    """

    def kept_priorities():
        for table, start, stop in zip(tables, starts, starts[1:], strict=False):
            yield table()["priority"][keep_decisions[start:stop] == KEEP]

    counts = np.zeros(1 << 16, dtype=np.int64)
    for priorities in kept_priorities():
        counts += np.bincount((priorities >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    if sample > counts.sum():
        return (1 << 64) - 1, len(keep_decisions)
    if sample == 0:
        return 0, 0
    below = np.cumsum(counts) - counts
    kind = int(np.searchsorted(below + counts, sample))  # the class with the sample's last record
    candidates = [p[p >> np.uint64(48) == kind] for p in kept_priorities()]
    ordered = np.sort(np.concatenate(candidates))
    rank = sample - int(below[kind])
    limit = ordered[rank - 1]
    return int(limit), rank - int(np.searchsorted(ordered, limit))
