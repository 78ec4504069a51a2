"""Report of samples: text for a terminal, or one HTML page from templates/samples.html."""

import base64
from collections.abc import Iterable
from pathlib import Path

from data_prep.reencode import fit
from data_prep.show_sample import ShownRow, ShownSample
from megatron_owl2.data.spans import Span
from megatron_owl2.utils.files import write_atomically
from megatron_owl2.utils.html_page import render

_TEMPLATE = Path(__file__).with_name("templates") / "samples.html"
_THUMBNAIL_SIDE = 320  # pixels
_GREEN, _FAINT, _PLAIN = "\033[32m", "\033[2m", "\033[0m"


def as_text(row: ShownRow, *, color: bool, ids: bool) -> str:
    """A row for the terminal: what is learnt in green with `color`, else between « and »."""
    lines = [row.title, *(_printable(f"  not used: {bad.reason}") for bad in row.bad)]
    for shown in row.samples:
        lines += [f"  {_facts(shown)}", "".join(_marked(span, color) for span in shown.spans)]
        if ids:
            lines += [f"  {span.kind}: {_ids(span)}" for span in shown.spans]
    return "\n".join(lines) + "\n"


def write_html(rows: Iterable[ShownRow], path: Path, *, ids: bool) -> None:
    """A page at `path` with rows, and the pixels of their images as the model gets them."""
    page = render(
        _TEMPLATE,
        ids=ids,
        rows=[
            {
                "title": row.title,
                "bad": [bad.reason for bad in row.bad],
                "samples": [_for_page(shown) for shown in row.samples],
            }
            for row in rows
        ],
    )
    write_atomically(path, page)


def _for_page(shown: ShownSample) -> dict:
    images = [fit(pixels, _THUMBNAIL_SIDE) for pixels in shown.sample.images]
    return {
        "facts": _facts(shown),
        "images": [base64.b64encode(jpeg).decode() for jpeg in images],
        "spans": [
            {"kind": span.kind, "text": span.text, "ids": _ids(span)} for span in shown.spans
        ],
    }


def _facts(shown: ShownSample) -> str:
    """Key, source, length, images and whether the sample was shortened, in a line."""
    sample = shown.sample
    images = f"{sample.image_count} image{'' if sample.image_count == 1 else 's'}"
    facts = [
        _printable(f"{sample.key} of {shown.source}"),
        f"{sample.length} positions, {shown.supervised} supervised",
        images,
    ]
    return "; ".join(facts + ["shortened to fit"] * sample.shortened)


def _ids(span: Span) -> str:
    """The ids of a span; the rows of an image have none."""
    if span.kind == "vision":
        return f"{len(span.ids)} rows"
    return " ".join(map(str, span.ids))


def _marked(span: Span, color: bool) -> str:
    text = _printable(span.text)
    if color:
        return {"given": "", "learnt": _GREEN, "vision": _FAINT}[span.kind] + text + _PLAIN
    return f"«{text}»" if span.kind == "learnt" else text


def _printable(text: str) -> str:
    """The text with what a terminal would obey, or not show, written as an escape."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )
