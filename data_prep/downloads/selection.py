"""Selection of the rows of a published corpus that are listed for download."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_owl2.errors import PreprocessError


@dataclass(frozen=True)
class Selection:
    """Limits on the rows of a corpus that are listed.

    Sides are in pixels, aspect is longer by shorter side, captions are in characters, `only` holds
    the labels to keep; `sample` is the number of rows to draw from those that pass, by `seed` and
    the row's number. Raises PreprocessError if a number cannot be.
    """

    min_score: dict[str, float] = field(default_factory=dict)
    max_score: dict[str, float] = field(default_factory=dict)
    only: dict[str, list[str]] = field(default_factory=dict)
    min_side: int | None = None
    max_aspect: float | None = None
    min_caption: int | None = None
    max_caption: int | None = None
    sample: int | None = None
    seed: int = 1234

    def __post_init__(self):
        for name in ("min_side", "min_caption", "max_caption", "sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PreprocessError(f"{name} is {value}; it must be positive")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise PreprocessError(f"max_aspect is {self.max_aspect}; it must be at least 1")


def judgements(table, selection: Selection) -> Iterator[tuple[str, np.ndarray]]:
    """Pairs of a reason to leave rows of a pyarrow table out, and these rows: bool [rows]."""
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made at run time

    def where(condition) -> np.ndarray:
        return np.asarray(pc.fill_null(condition, False))

    yield "no address", ~where(pc.match_substring_regex(table["url"], "^(?i)https?://."))
    length = np.asarray(pc.fill_null(pc.utf8_length(table["caption"]), 0))
    yield "no caption", length == 0
    if selection.min_caption is not None:
        yield f"caption shorter than {selection.min_caption}", length < selection.min_caption
    if selection.max_caption is not None:
        yield f"caption longer than {selection.max_caption}", length > selection.max_caption
    if selection.min_side is not None or selection.max_aspect is not None:
        sides = [np.nan_to_num(_numbers(table[name])) for name in ("width", "height")]
        short, long = np.minimum(*sides), np.maximum(*sides)
        yield "no size", ~(short > 0)
        if selection.min_side is not None:
            yield f"side below {selection.min_side}", short < selection.min_side
        if selection.max_aspect is not None:
            yield f"aspect above {selection.max_aspect}", long > selection.max_aspect * short
    for name in dict.fromkeys([*selection.min_score, *selection.max_score]):
        score = _numbers(table[name])
        yield f"no {name}", np.isnan(score)
        if name in selection.min_score:
            yield f"{name} below {selection.min_score[name]}", score < selection.min_score[name]
        if name in selection.max_score:
            yield f"{name} above {selection.max_score[name]}", score > selection.max_score[name]
    for name, labels in selection.only.items():
        column = table[name].cast("string")
        yield f"{name} is not {' or '.join(labels)}", ~where(pc.is_in(column, _set(labels)))


def _numbers(column) -> np.ndarray:
    """Values of a column, fp64 [rows]; NaN for what is no number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return np.asarray(pc.fill_null(column.cast("float64"), np.nan), dtype=float)
    except pa.ArrowException:
        return np.array([_number(value) for value in column.to_pylist()], dtype=float)


def _number(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return float("nan")


def _set(labels: list[str]):
    import pyarrow as pa

    return pa.array(labels, pa.string())
