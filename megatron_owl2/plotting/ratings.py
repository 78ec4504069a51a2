"""Figure of a tally of ratings: a panel for every skill, a bar from A to D for every model."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_owl2.plotting import figure

# Of a rating's bar and of the count in it.
_COLORS = {
    "A": ("#0f7b3e", "white"),
    "B": ("#8cc5a0", "#1f2933"),
    "C": ("#f0b27a", "#1f2933"),
    "D": ("#c0262d", "white"),
}
_COLUMNS = 3
_WIDTH, _BAR_INCHES, _REST_INCHES = 5.0, 0.3, 0.6  # of a panel


def draw(path: Path, tally: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """A PNG at `path` of what `rating.tally` gives, published counts below one's own.

    A bar is as long as the share of each rating, in which the count is written. `names` are words
    for skills with short names. Raises ReportError if matplotlib is not installed.
    """
    panels = _panels(tally)
    rows = math.ceil(len(panels) / _COLUMNS)
    bars = max(map(len, panels.values()))
    height = rows * (_BAR_INCHES * bars + _REST_INCHES) + 0.8
    with figure.canvas(
        path, "Ratings by people", _WIDTH * min(_COLUMNS, len(panels)), height
    ) as page:
        axes = [*page.subplots(rows, min(_COLUMNS, len(panels)), squeeze=False).flat]
        for axis, (skill, models) in zip(axes, panels.items(), strict=False):
            named = f"{skill}: {names[skill]}" if skill in names else skill
            axis.set_title(named, loc="left", fontsize=10)
            _stack(axis, models)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        page.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def _panels(tally: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, int]]]:
    """Counts by panel and model: all answers first, then each skill that has ratings."""
    own = tally["models"]
    published = tally.get("published", {"models": {}})["models"]
    panels = {"all answers": {model: row["overall"] for model, row in own.items()}}
    for table, mark in ((own, ""), (published, " (published)")):
        for model, row in table.items():
            for skill, counts in row["skills"].items():
                panels.setdefault(skill, {})[model + mark] = counts
    return panels


def _stack(axis, models: Mapping[str, Mapping[str, int]]) -> None:
    """The bars of a panel, the first model on top."""
    labels = [f"{model}, n = {counts['n']}" for model, counts in models.items()]
    left = [0.0] * len(models)
    for rating, (color, ink) in _COLORS.items():
        shares = [100 * c[rating] / c["n"] if c["n"] else 0.0 for c in models.values()]
        bars = axis.barh(labels, shares, 0.8, left, color=color, label=rating)
        shown = [str(c[rating]) if c[rating] else "" for c in models.values()]
        axis.bar_label(bars, shown, label_type="center", fontsize=8, color=ink)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("share of the ratings, %")
