"""Figure of a report: loss curves, accuracy per skill, and images with their answers."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_owl2.data import pillow_images
from megatron_owl2.errors import ReportError
from megatron_owl2.plotting.report import Answer, LossCurves, Scores

_INK, _FAINT, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_RIGHT, _WRONG = "#0f7b3e", "#c0262d"
_SETS = ("#2b6cb0", "#ed8936", "#805ad5", "#319795")
_COLUMNS = 4
_IMAGE_INCHES, _LINE_INCHES = 2.25, 0.185
_PIXELS = 300  # of an enlarged image


def draw(
    path: Path,
    title: str,
    curves: Sequence[LossCurves],
    scores: Scores,
    answers: Sequence[Answer],
    answered_set: str | None,
) -> None:
    """A PNG at `path` with those of the three sections that there is anything for.

    `answers` are of the set `answered_set`. Raises ReportError if matplotlib is not installed or
    an image cannot be read.
    """
    texts = [_lines(answer) for answer in answers]
    rows = [texts[i : i + _COLUMNS] for i in range(0, len(texts), _COLUMNS)]
    heights = [
        height
        for row in rows
        for height in (_IMAGE_INCHES, _LINE_INCHES * (max(map(len, row)) + 1))
    ]
    sections = [
        (_curves_inches(curves), lambda box: _curves(box, curves), bool(curves)),
        (2.9, lambda box: _bars(box, scores), bool(scores)),
        (
            0.5 + sum(heights),
            lambda box: _images(box, answers, texts, heights, answered_set),
            bool(answers),
        ),
    ]
    shown = [(height, paint) for height, paint, wanted in sections if wanted]
    shares = [height for height, _ in shown]
    with canvas(path, title, 11, sum(shares) + 0.5) as figure:
        boxes = figure.subfigures(len(shown), 1, height_ratios=shares, squeeze=False)[:, 0]
        for (_, paint), box in zip(shown, boxes, strict=True):
            paint(box)


@contextmanager
def canvas(path: Path, title: str, width: float, height: float) -> Iterator:
    """A matplotlib figure of so many inches in the style of all our plots, written to `path` at
    the end. Raises ReportError if matplotlib is not installed or `path` does not end in .png."""
    if path.suffix.lower() != ".png":
        raise ReportError(f"{path} must end in .png")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ReportError(
            "the PNG needs matplotlib; install the extra: pip install 'megatron-owl2[report]'"
        ) from None

    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": _INK,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
    }
    with rc_context(style):
        engine = ConstrainedLayoutEngine(w_pad=0.1)
        figure = Figure(figsize=(width, height), dpi=130, layout=engine)
        figure.suptitle(title, fontsize=15, fontweight="bold")
        yield figure
        figure.savefig(path, facecolor="white")


def curve(
    axis,
    steps: Sequence[int],
    values: list[float],
    color: str,
    label: str = "",
    *,
    smoothed: bool = True,
) -> None:
    """A line of values over steps; `smoothed`: faintly as they are, and smoothed on top."""
    if smoothed:
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=1)
        values = smooth(values)
    axis.plot(steps, values, color=color, linewidth=2, label=label)
    axis.grid(color=_GRID)


def validation_curve(
    axis, steps: Sequence[int], values: Sequence[float], color: str, source: str
) -> None:
    """A dashed line with a marker for every validation of one source."""
    label = f"validation {source}"
    axis.plot(
        steps,
        values,
        color=color,
        linestyle="--",
        linewidth=1.5,
        marker="o",
        markersize=4,
        label=label,
    )


def _curves_inches(curves: Sequence[LossCurves]) -> float:
    """Height of the loss curves with the rows of their legend, two lines in each."""
    lines = max((len(run.validation) + 1 for run in curves if run.validation), default=0)
    return 2.5 + _LINE_INCHES * math.ceil(lines / 2)


def _curves(box, curves: Sequence[LossCurves]) -> None:
    box.suptitle("Training loss", x=0.01, ha="left", fontweight="bold")
    axes = box.subplots(1, len(curves), squeeze=False)[0]
    for axis, run in zip(axes, curves, strict=True):
        curve(axis, run.steps, run.losses, _SETS[0], "training")
        colors = cycle((*_SETS[1:], _WRONG, _FAINT))
        for color, (source, line) in zip(colors, run.validation.items(), strict=False):
            validation_curve(axis, *line, color, source)
        if run.validation:  # below the axis, where no curve is
            axis.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=2, fontsize=7, frameon=False
            )
        axis.annotate(
            f"{smooth(run.losses)[-1]:.3f}",
            (1, 0.97),
            xycoords="axes fraction",
            ha="right",
            va="top",
            color=_SETS[0],
            fontweight="bold",
        )
        axis.set_title(run.name, loc="left", fontsize=10)
        axis.set_xlabel("step")
        highest = max([*run.losses, *(max(values) for _, values in run.validation.values())])
        axis.set_ylim(0, highest * 1.05)


def _bars(box, scores: Scores) -> None:
    title = "Accuracy per skill, % (below each: questions of the sets)"
    box.suptitle(title, x=0.01, ha="left", fontweight="bold")
    axis = box.subplots()
    skills = list(dict.fromkeys(skill for rows in scores.values() for skill in rows))
    width = 0.8 / len(scores)
    for i, (name, rows) in enumerate(scores.items()):
        found = [(k, rows[skill]) for k, skill in enumerate(skills) if skill in rows]
        places = [k + (i - (len(scores) - 1) / 2) * width for k, _ in found]
        heights = [row.accuracy or 0 for _, row in found]
        bars = axis.bar(places, heights, width * 0.92, color=_SETS[i % len(_SETS)], label=name)
        axis.bar_label(bars, fmt="%.0f", fontsize=8, color=_INK, padding=1)
        for kind, marker in (("blind", "o"), ("majority", "_")):
            values = [getattr(row, kind) for _, row in found]
            seen = [(x, v) for x, v in zip(places, values, strict=True) if v is not None]
            axis.scatter(
                [x for x, _ in seen],
                [v for _, v in seen],
                marker=marker,
                s=22 if kind == "blind" else 160,
                facecolor="white" if kind == "blind" else _INK,
                edgecolor=_INK if kind == "blind" else None,
                linewidth=1.2,
                zorder=3,
                label={"blind": "black image", "majority": "majority answer"}[kind]
                if i == 0
                else None,
            )
    questions = [
        dict.fromkeys(str(rows[skill].n) for rows in scores.values() if skill in rows)
        for skill in skills
    ]
    labels = [f"{skill}\n{', '.join(n)}" for skill, n in zip(skills, questions, strict=True)]
    axis.set_xticks(range(len(skills)), labels, color=_INK, fontsize=8)
    axis.tick_params(axis="x", length=0)
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 25))
    axis.set_axisbelow(True)
    axis.grid(axis="y", color=_GRID)
    axis.legend(loc="lower left", bbox_to_anchor=(0.2, 1.0), ncols=len(scores) + 2, frameon=False)


def _images(
    box, answers: Sequence[Answer], texts, heights: list[float], answered_set: str | None
) -> None:
    box.suptitle(f"Answers on the set {answered_set}", x=0.01, ha="left", fontweight="bold")
    axes = box.subplots(len(heights), _COLUMNS, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set_axis_off()
    for shown, below, answer, text in zip(
        axes[::2].flat, axes[1::2].flat, answers, texts, strict=False
    ):
        shown.imshow(_enlarged(answer.image))
        for k, (line, color, weight) in enumerate(text):
            below.annotate(
                line,
                (0.5, 1),
                xycoords="axes fraction",
                xytext=(0, -72 * _LINE_INCHES * k),
                textcoords="offset points",
                ha="center",
                va="top",
                color=color,
                fontweight=weight,
                fontsize=9.5,
            )


def _lines(answer: Answer) -> list[tuple[str, str, str]]:
    """(text, colour, weight) of the lines below an image; the gold only where it is missed."""
    lines = [(line, _INK, "normal") for line in _wrapped(answer.question)]
    color = _RIGHT if answer.right else _WRONG
    lines += [(line, color, "bold") for line in _wrapped(answer.answer) or ["(no answer)"]]
    if not answer.right:
        lines += [(line, _FAINT, "normal") for line in _wrapped(f"gold: {answer.gold}")]
    return lines


def _wrapped(text: str) -> list[str]:
    """At most two lines; a dollar sign would start a formula."""
    plain = "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")
    return textwrap.wrap(plain, 36, max_lines=2, placeholder=" ...")


def _enlarged(path: Path) -> Image.Image:
    """The image at the size it is shown in; matplotlib would blur a small one."""
    try:
        image = Image.fromarray(pillow_images.decode(path.read_bytes()))
    except OSError as error:
        raise ReportError(f"{path} cannot be shown: {error.strerror}") from None
    except pillow_images.UnusableImageError as error:
        raise ReportError(f"{path} cannot be shown: {error}") from None
    scale = _PIXELS / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


def smooth(values: list[float]) -> list[float]:
    """Moving average over a fortieth of the curve to either side, as far as there are values."""
    reach = len(values) // 40
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
