"""Plots of training runs: the metrics of their metrics.jsonl over the steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from megatron_owl2.plotting import figure
from megatron_owl2.plotting.report import (
    Series,
    read_metrics,
    validation_losses,
    values_over_steps,
)

_WIDTH, _HEIGHT = 6.5, 2.4  # inches of a panel
_COLORS = ("#1f2933", "#2b6cb0", "#ed8936", "#805ad5", "#319795", "#c0262d", "#7b8794", "#b7791f")
_RATES = "learning rate"


@dataclass(frozen=True)
class _Panel:
    """The lines of one panel: of the training steps, and of the validations."""

    training: Series
    validation: Series = field(default_factory=dict)

    def lines(self) -> list[list[float]]:
        """The values of every line."""
        return [values for _, values in [*self.training.values(), *self.validation.values()]]


def draw(path: Path, runs: Sequence[Path]) -> None:
    """A PNG at `path` with a column for every run directory and a row for every kind of curve.

    Raises ReportError if a run has no metrics or matplotlib is not installed.
    """
    columns = [_panels(read_metrics(run)) for run in runs]
    titles = [title for title in columns[0] if any(column[title].lines() for column in columns)]
    width, height = _WIDTH * len(runs), _HEIGHT * len(titles) + 0.6
    with figure.canvas(path, "Training", width, height) as page:
        axes = page.subplots(len(titles), len(runs), squeeze=False, sharex="col")
        for row, title in zip(axes, titles, strict=True):
            for axis, run, column in zip(row, runs, columns, strict=True):
                _draw_panel(axis, column[title], smooth=title != _RATES)
                axis.set_title(f"{run.name}: {title}", loc="left", fontsize=10)
        for axis in axes[-1]:
            axis.set_xlabel("step")


def _panels(rows: list[dict]) -> dict[str, _Panel]:
    """The panels of a run by title; one without any value has no lines."""
    losses = {"all": "loss", "with an image": "image_loss", "text only": "text_loss"}
    found = {
        "loss": {label: values_over_steps(rows, key) for label, key in losses.items()},
        "gradient norm": {
            "all": values_over_steps(rows, "grad_norm"),
            **_nested(rows, "grad_norms"),
        },
        _RATES: _nested(rows, "rates") or {"": values_over_steps(rows, "lr")},
        "tokens per second": {"": values_over_steps(rows, "tokens_per_second")},
        "MFU, %": {"": values_over_steps(rows, "mfu", 100)},
        "waiting for data, %": {"": values_over_steps(rows, "data_wait_share", 100)},
    }
    panels = {
        title: _Panel({label: line for label, line in lines.items() if line[0]})
        for title, lines in found.items()
    }
    panels["loss"] = _Panel(panels["loss"].training, validation_losses(rows))
    return panels


def _nested(rows: list[dict], key: str) -> Series:
    inner = [{"step": row["step"], **row.get(key, {})} for row in rows]
    names = dict.fromkeys(name for row in inner for name in row if name != "step")
    return {name: values_over_steps(inner, name) for name in names}


def _draw_panel(axis, panel: _Panel, *, smooth: bool) -> None:
    lines = panel.lines()
    axis.set_visible(bool(lines))
    colors = cycle(_COLORS)
    for label, (steps, values) in panel.training.items():
        figure.curve(axis, steps, values, next(colors), label, smoothed=smooth)
    for source, (steps, values) in panel.validation.items():
        figure.validation_curve(axis, steps, values, next(colors), source)
    if len(lines) > 1:
        # Parts of the model differ by orders of magnitude, losses by little.
        highest = [max(values) for values in lines]
        if min(highest) > 0 and max(highest) > 5 * min(highest):
            axis.set_yscale("log")
        axis.legend(fontsize=7, ncols=2, frameon=False)
