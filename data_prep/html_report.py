"""HTML report of a data set: one page without scripts, rendered from templates/report.html.

This module prepares the values (texts, and coordinates in SVG units); the template has the rest.
"""

import base64
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus_statistics import Statistics
from data_prep.filters import Filters, score_title
from data_prep.reencode import fit
from megatron_owl2.data.images import decode
from megatron_owl2.data.sampling.keyed_random import combine
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.shards.tar import unpack_sample
from megatron_owl2.data.shards.writer import INDEX
from megatron_owl2.errors import BadSampleError
from megatron_owl2.utils.files import write_atomically
from megatron_owl2.utils.html_page import render

_TEMPLATE = Path(__file__).with_name("templates") / "report.html"
_THUMBNAILS = 24
_THUMBNAIL_SIDE = 320  # pixels, shown at half of that
_TEXT = 240  # characters below a thumbnail
_WIDTH, _HEIGHT = 520, 170  # of a histogram, in SVG units
_WIDEST = 65  # of a bar
_TICKS = 9  # at most, below a histogram


def write_html_report(
    folder: Path, path: Path, report: Statistics, rows: Sequence[dict], filters: Filters
) -> None:
    """Page at `path` about the data set in `folder`, whose shards are the manifest `rows`.

    The same data set gives the same bytes.
    """
    page = render(
        _TEMPLATE,
        name=folder.resolve().name,
        totals=_totals(report),
        reasons=_reasons(report),
        unread=report.unread,
        charts=_charts(report, filters),
        samples=[_sample(record) for record in _chosen(folder, rows)],
    )
    write_atomically(path, page)


def _totals(report: Statistics) -> list[dict[str, str]]:
    share = f"{report.kept / report.read:.1%} of {report.read:,} read"
    totals = [
        (f"{report.kept:,}", f"samples kept, {share}"),
        (f"{report.read - report.kept:,}", "samples left out"),
        (f"{report.shards:,}", "shards"),
        (_size(report.bytes), f"{_size(report.bytes / report.kept)} per sample"),
    ]
    if report.asked is not None:
        totals.append((f"{report.asked:,}", "samples asked for"))
    return [{"value": value, "label": label} for value, label in totals]


def _reasons(report: Statistics) -> list[dict[str, Any]]:
    most = max(report.skipped.values(), default=0)
    return [
        {
            "name": reason,
            "width": f"{max(100 * count / most, 0.5):.1f}%",
            "count": f"{count:,}",
            "share": f"{count / report.read:.2%}",
            "examples": report.examples[reason],
        }
        for reason, count in report.skipped.items()
    ]


def _charts(report: Statistics, filters: Filters) -> list[dict[str, Any]]:
    """Histograms of everything that was read at least once, with the limits that were set."""
    limits = {
        "smaller side": (filters.min_side,),
        "aspect ratio": (filters.max_aspect,),
        "text length": (filters.min_caption, filters.max_caption),
    }
    for name in filters.score_names:
        limits[score_title(name)] = (filters.min_score.get(name), filters.max_score.get(name))
    return [
        _chart(name, histogram, [limit for limit in limits.get(name, ()) if limit is not None])
        for name, histogram in report.histograms.items()
        if any(histogram["read"])
    ]


def _chart(name: str, histogram: dict[str, Any], limits: Sequence[float]) -> dict[str, Any]:
    """Bars of equal width between the edges, without the empty ones at both ends."""
    edges, read, kept = histogram["edges"], histogram["read"], histogram["kept"]
    used = np.flatnonzero(np.maximum(read, kept))
    first, last = int(used[0]), int(used[-1])
    count, most = last - first + 1, max(*read, *kept)
    step = min(_WIDTH / count, _WIDEST)

    def box(kind: str, place: int, samples: int, inset: float) -> dict[str, str]:
        height = samples / most * _HEIGHT
        return {
            "kind": kind,
            "x": f"{place * step + inset:.1f}",
            "y": f"{_HEIGHT - height:.1f}",
            "width": f"{max(step - 2 * inset, 0.5):.1f}",
            "height": f"{height:.1f}",
        }

    bars = []
    for place, index in enumerate(range(first, last + 1)):
        low = _tick(name, edges[index - 1]) if index else "less"
        high = _tick(name, edges[index]) if index < len(edges) else "more"
        title = f"{low} to {high}: {read[index]:,} read, {kept[index]:,} kept"
        boxes = [box("read", place, read[index], 1), box("kept", place, kept[index], 1 + step / 6)]
        bars.append({"title": title, "boxes": boxes})
    inner = range(first, last)  # edges between two bars
    ticks = [
        {"x": f"{(index - first + 1) * step:.1f}", "text": _tick(name, edges[index])}
        for index in inner[:: max(1, -(-len(inner) // _TICKS))]
    ]
    # Between two edges a limit stands where a straight line puts it.
    places = np.interp(limits, edges, np.arange(1, len(edges) + 1)) - first
    return {
        "name": name,
        "unit": histogram["unit"],
        "width": _WIDTH,
        "height": _HEIGHT,
        "most": f"{most:,}",
        "bars": bars,
        "ticks": ticks,
        "limits": [f"{place * step:.1f}" for place in places if 0 <= place <= count],
    }


def _chosen(folder: Path, rows: Sequence[dict]) -> Iterator[Record]:
    """Records from all over the data set, one from each of as many equal stretches."""
    ends = list(accumulate(row["samples"] for row in rows))
    count = min(_THUMBNAILS, ends[-1])
    for turn in range(count):
        low, high = (ends[-1] * place // count for place in (turn, turn + 1))
        number = low + combine(turn, ends[-1]) % (high - low)
        shard = int(np.searchsorted(ends, number, side="right"))
        path = folder / rows[shard]["name"]
        offsets = np.fromfile(f"{path}{INDEX}", dtype="<u8")
        start, stop = map(int, offsets[number - ends[shard] + rows[shard]["samples"] :][:2])
        with path.open("rb") as file:
            file.seek(start)
            yield Record.from_members(*unpack_sample(file.read(stop - start)))


def _sample(record: Record) -> dict[str, str]:
    """Text, key and thumbnail (base64 of a JPEG, or the reason why there is none) of a record."""
    if record.caption is not None:
        text = record.caption
    else:
        text = " / ".join(f"{turn.question} - {turn.answer}" for turn in record.turns)
    text = text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
    sample = {"text": text, "key": record.key, "jpeg": "", "why_no_image": ""}
    if not record.images:
        return sample | {"why_no_image": "no image"}
    try:
        jpeg = fit(decode(record.images[0]), _THUMBNAIL_SIDE)
    except BadSampleError:
        return sample | {"why_no_image": "cannot be decoded"}
    return sample | {"jpeg": base64.b64encode(jpeg).decode()}


def _tick(name: str, value: float) -> str:
    return _size(value) if name == "image bytes" else f"{value:g}"


def _size(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
