"""The curves of training runs as a picture: what metrics.jsonl holds, over the steps."""

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_owl2.plotting import figure
from megatron_owl2.plotting.report import read_metrics

_WIDTH, _HEIGHT = 6.5, 2.4  # inches of a panel
_COLORS = ("#1f2933", "#2b6cb0", "#ed8936", "#805ad5", "#319795", "#c0262d", "#7b8794", "#b7791f")
_RATES = "learning rate"

Series = dict[str, tuple[list[int], list[float]]]  # label -> steps and values


def draw(path: Path, runs: Sequence[Path]) -> None:
    """Write a PNG with a column for every run directory and a row for every kind of curve.

    Raises ReportError if a run has no metrics or matplotlib is not installed.
    """
    columns = [_panels(read_metrics(run)) for run in runs]
    titles = [title for title in columns[0] if any(column[title] for column in columns)]
    width, height = _WIDTH * len(runs), _HEIGHT * len(titles) + 0.6
    with figure.canvas(path, "Training", width, height) as page:
        axes = page.subplots(len(titles), len(runs), squeeze=False, sharex="col")
        for row, title in zip(axes, titles, strict=True):
            for axis, run, column in zip(row, runs, columns, strict=True):
                _draw_panel(axis, column[title], smooth=title != _RATES)
                axis.set_title(f"{run.name}: {title}", loc="left", fontsize=10)
        for axis in axes[-1]:
            axis.set_xlabel("step")


def _panels(rows: list[dict]) -> dict[str, Series]:
    """What is drawn of a run, by title; a panel without any value is empty."""
    losses = {"all": "loss", "with an image": "image_loss", "text only": "text_loss"}
    found = {
        "loss": {label: _values(rows, key) for label, key in losses.items()},
        "gradient norm": {"all": _values(rows, "grad_norm"), **_nested(rows, "grad_norms")},
        _RATES: _nested(rows, "rates") or {"": _values(rows, "lr")},
        "tokens per second": {"": _values(rows, "tokens_per_second")},
        "MFU, %": {"": _values(rows, "mfu", 100)},
        "waiting for data, %": {"": _values(rows, "data_wait_share", 100)},
    }
    return {
        title: {label: series for label, series in panel.items() if series[0]}
        for title, panel in found.items()
    }


def _values(rows: list[dict], key: str, scale: float = 1) -> tuple[list[int], list[float]]:
    """Steps and values of those rows that have a finite value."""
    kept = [(row["step"], row.get(key)) for row in rows]
    kept = [(step, v * scale) for step, v in kept if v is not None and math.isfinite(v)]
    return [step for step, _ in kept], [value for _, value in kept]


def _nested(rows: list[dict], key: str) -> Series:
    inner = [{"step": row["step"], **row.get(key, {})} for row in rows]
    names = dict.fromkeys(name for row in inner for name in row if name != "step")
    return {name: _values(inner, name) for name in names}


def _draw_panel(axis, panel: Series, *, smooth: bool) -> None:
    axis.set_visible(bool(panel))
    for color, (label, (steps, values)) in zip(_COLORS, panel.items(), strict=False):
        figure.curve(axis, steps, values, color, label, smoothed=smooth)
    if len(panel) > 1:
        # Parts of the model differ by orders of magnitude, losses by little.
        highest = [max(values) for _, values in panel.values()]
        if min(highest) > 0 and max(highest) > 5 * min(highest):
            axis.set_yscale("log")
        axis.legend(fontsize=7, ncols=2, frameon=False)
