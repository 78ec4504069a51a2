"""report.html: what came of a corpus, for a person to look at; one file without scripts."""

import base64
from collections.abc import Iterator, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_prep.corpus_statistics import Statistics
from data_prep.filters import Filters, score_title
from data_prep.reencode import fit
from megatron_owl2.data.images import decode
from megatron_owl2.data.sampling.keyed_random import combine
from megatron_owl2.data.shards.manifest import write_atomically
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.shards.tar import unpack_sample
from megatron_owl2.data.shards.writer import INDEX
from megatron_owl2.errors import BadSampleError

_THUMBNAILS = 24
_THUMBNAIL_SIDE = 320  # pixels, shown at half of that
_TEXT = 240  # characters below a thumbnail
_WIDTH, _HEIGHT, _AXIS = 520, 170, 34  # of a histogram, in SVG units
_WIDEST = 65  # of a bar
_STYLE = """
:root { --ink: #1c2330; --dim: #667085; --line: #e4e7ec; --read: #cfd8e6; --kept: #2f6fde;
  --limit: #d1493f; --card: #fff; --page: #f6f7f9; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #2d3542;
  --read: #47536a; --kept: #6aa0ff; --limit: #ff8177; --card: #1a202b; --page: #12161e } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 32px 24px 64px; max-width: 1180px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 28px } h2 { margin: 40px 0 12px; font-size: 19px }
h3 { margin: 0 0 2px; font-size: 15px } .dim { color: var(--dim) }
.totals, .grid, .pictures { display: grid; gap: 14px }
.totals { grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); margin-top: 20px }
.grid { grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)) }
.pictures { grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; overflow: hidden }
.totals b { display: block; font-size: 25px; font-variant-numeric: tabular-nums }
table { width: 100%; border-collapse: collapse } td, th { padding: 7px 10px; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--line) } tr:last-child td { border: 0 }
th { color: var(--dim); font-weight: 500 }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.bar { display: block; height: 6px; margin-top: 7px; border-radius: 3px; background: var(--limit) }
ul { margin: 0; padding: 0; list-style: none } td ul { overflow-wrap: anywhere; font-size: 13px }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--dim); font-size: 12px }
.read { fill: var(--read) } .kept { fill: var(--kept) }
.limit { stroke: var(--limit); stroke-width: 2; stroke-dasharray: 4 3 }
.key i { display: inline-block; width: 11px; height: 11px; margin: 0 6px 0 14px;
  border-radius: 2px }
figure.card { margin: 0; padding: 0 } figure img, figure .none { display: block; width: 100%;
  height: 160px; object-fit: contain; background: var(--line) }
.none { padding-top: 68px; text-align: center; color: var(--dim) }
figcaption { padding: 9px 11px; font-size: 13px; overflow-wrap: anywhere }
figcaption .dim { display: block; font-size: 11px }
"""


def write_html_report(
    folder: Path, path: Path, report: Statistics, rows: Sequence[dict], filters: Filters
) -> None:
    """Write the page on the data set in `folder`, whose shards `rows` lists; the same bytes for
    the same data set."""
    name = escape(folder.resolve().name)
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{name}</h1>
<div class="dim">A data set of megatron_owl2: what was read, what was left out, what is there</div>
{_totals(report)}
<h2>Left out</h2>
{_reasons(report)}
<h2>Distributions</h2>
<p class="dim key"><i style="background: var(--read)"></i>read, as found
<i style="background: var(--kept)"></i>kept, as stored
<i style="background: var(--limit)"></i>limit</p>
<div class="grid">
{_histograms(report, filters)}
</div>
<h2>A look inside</h2>
<div class="pictures">
{_pictures(folder, rows)}
</div>
</body>
</html>
"""
    write_atomically(path, text.encode())


def _totals(report: Statistics) -> str:
    share = f"{report.kept / report.read:.1%} of {report.read:,} read"
    cards = [
        (f"{report.kept:,}", f"samples kept, {share}"),
        (f"{report.read - report.kept:,}", "samples left out"),
        (f"{report.shards:,}", "shards"),
        (_size(report.bytes), f"{_size(report.bytes / report.kept)} per sample"),
    ]
    if report.asked is not None:
        cards.append((f"{report.asked:,}", "samples asked for"))
    items = (f'<div class="card"><b>{b}</b><span class="dim">{t}</span></div>' for b, t in cards)
    return f'<div class="totals">\n{"".join(items)}\n</div>'


def _reasons(report: Statistics) -> str:
    if not report.skipped:
        return '<div class="card">Nothing: every sample was kept.</div>'
    most = max(report.skipped.values())
    lines = []
    for reason, count in report.skipped.items():
        examples = "".join(f"<li>{_text(text)}</li>" for text in report.examples[reason])
        lines.append(
            f"<tr><td>{_text(reason)}"
            f'<span class="bar" style="width: {max(100 * count / most, 0.5):.1f}%"></span></td>'
            f'<td class="number">{count:,}</td>'
            f'<td class="number">{count / report.read:.2%}</td>'
            f'<td><ul class="dim">{examples}</ul></td></tr>'
        )
    head = (
        '<tr><th style="width: 32%">reason</th><th class="number">samples</th>'
        '<th class="number">of those read</th><th>examples</th></tr>'
    )
    return f'<div class="card"><table>{head}{"".join(lines)}</table></div>'


def _histograms(report: Statistics, filters: Filters) -> str:
    limits = {
        "smaller side": (filters.min_side,),
        "aspect ratio": (filters.max_aspect,),
        "text length": (filters.min_caption, filters.max_caption),
    }
    for name in filters.score_names:
        limits[score_title(name)] = (filters.min_score.get(name), filters.max_score.get(name))
    cards = []
    for name, histogram in report.histograms.items():
        if any(histogram["read"]):
            asked = [limit for limit in limits.get(name, ()) if limit is not None]
            unit = f'<span class="dim">{histogram["unit"]}</span>'
            cards.append(
                f'<div class="card"><h3>{_text(name)} {unit}</h3>{_chart(name, histogram, asked)}'
                "</div>"
            )
    return "\n".join(cards)


def _chart(name: str, histogram: dict, limits: list[float]) -> str:
    """Bars of equal width between the edges, without the empty ones at both ends."""
    edges, read, kept = histogram["edges"], histogram["read"], histogram["kept"]
    used = np.flatnonzero(np.maximum(read, kept))
    first, last = int(used[0]), int(used[-1])
    bars, most = last - first + 1, max(*read, *kept)
    step = min(_WIDTH / bars, _WIDEST)

    def box(kind: str, place: int, count: int, inset: float) -> str:
        height = count / most * _HEIGHT
        return (
            f'<rect class="{kind}" x="{place * step + inset:.1f}" y="{_HEIGHT - height:.1f}" '
            f'width="{max(step - 2 * inset, 0.5):.1f}" height="{height:.1f}"/>'
        )

    shapes = []
    for place, index in enumerate(range(first, last + 1)):
        low = _tick(name, edges[index - 1]) if index else "less"
        high = _tick(name, edges[index]) if index < len(edges) else "more"
        title = f"<title>{low} to {high}: {read[index]:,} read, {kept[index]:,} kept</title>"
        pair = box("read", place, read[index], 1) + box("kept", place, kept[index], 1 + step / 6)
        shapes.append(f"<g>{title}{pair}</g>")
    inner = range(first, last)  # edges between two bars
    for index in inner[:: max(1, -(-len(inner) // 9))]:
        x = (index - first + 1) * step
        shapes.append(
            f'<text x="{x:.1f}" y="{_HEIGHT + 18}" text-anchor="middle">'
            f"{_tick(name, edges[index])}</text>"
        )
    for limit in limits:
        # Between two edges a limit stands where a straight line puts it.
        x = float(np.interp(limit, edges, np.arange(1, len(edges) + 1))) - first
        if 0 <= x <= bars:
            shapes.append(
                f'<line class="limit" x1="{x * step:.1f}" x2="{x * step:.1f}" y1="0" '
                f'y2="{_HEIGHT}"/>'
            )
    label = f"most: {most:,}"
    return (
        f'<svg viewBox="0 -16 {_WIDTH} {_HEIGHT + _AXIS + 6}" role="img" '
        f'aria-label="{_text(name)}">{"".join(shapes)}'
        f'<text x="{_WIDTH}" y="-4" text-anchor="end">{label}</text></svg>'
    )


def _pictures(folder: Path, rows: Sequence[dict]) -> str:
    figures = []
    for record in _chosen(folder, rows):
        if record.caption is not None:
            text = record.caption
        else:
            text = " / ".join(f"{turn.question} - {turn.answer}" for turn in record.turns)
        text = text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
        figures.append(
            f'<figure class="card">{_picture(record)}<figcaption>{_text(text)}'
            f'<span class="dim">{_text(record.key)}</span></figcaption></figure>'
        )
    return "\n".join(figures)


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


def _picture(record: Record) -> str:
    if record.image is None:
        return '<div class="none">no picture</div>'
    try:
        pixels = decode(record.image)
    except BadSampleError:
        return '<div class="none">cannot be decoded</div>'
    data = base64.b64encode(fit(pixels, _THUMBNAIL_SIDE)).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def _text(text: str) -> str:
    return escape(text).encode(errors="replace").decode()


def _tick(name: str, value: float) -> str:
    return _size(value) if name == "image bytes" else f"{value:g}"


def _size(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
