"""Figure of attention maps: the paper's figures 4 and 5, for one model or two side by side."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_owl2.plotting import figure

if TYPE_CHECKING:
    from megatron_owl2.inference.attention_maps import AttentionMaps, ModalityShares

_COLORS = {"text": "#2b6cb0", "image": "#ed8936", "answer": "#0f7b3e"}
_COLUMNS, _WIDTH, _MAP_HEIGHT, _CURVE_HEIGHT = 2, 8.2, 3.6, 2.5  # inches
_LEAST = 1e-4  # the probability from which on a map has colours
_LABELLED = 0.07  # share of the positions from which on a range has its name beside it


@dataclass(frozen=True)
class Attention:
    """What a figure shows of one model; `layers` are those of its maps."""

    name: str
    prompt: str
    answer: str
    found: "AttentionMaps"
    shares: "ModalityShares"
    layers: Sequence[int]


@dataclass(frozen=True)
class Range:
    """Neighbouring positions of one kind (text, image or answer), from `start` up to `end`."""

    kind: str
    start: int
    end: int


def draw(path: Path, models: Sequence[Attention]) -> None:
    """A PNG at `path` with a column for every model: maps of layers, and the averages of all.

    Raises ReportError if matplotlib is not installed.
    """
    rows = max(-(-len(model.layers) // _COLUMNS) for model in models)
    heights = [_MAP_HEIGHT] * rows + [_CURVE_HEIGHT]
    size = _WIDTH * len(models), sum(heights) + 1.3
    with figure.canvas(path, "Attention of the decoder, mean over heads", *size) as page:
        boxes = page.subfigures(1, len(models), squeeze=False)[0]
        for box, model in zip(boxes, models, strict=True):
            _draw_model(box, model, heights)


def ranges(found: "AttentionMaps") -> list[Range]:
    """The ranges of text, images and answer in the order of the positions; images that follow each
    other directly are one range."""
    vision = found.vision.tolist()
    kinds = [
        "image" if seen else "answer" if place >= found.prompt_positions else "text"
        for place, seen in enumerate(vision)
    ]
    found_ranges, start = [], 0
    for kind, run in groupby(kinds):
        end = start + len([*run])
        found_ranges.append(Range(kind, start, end))
        start = end
    return found_ranges


def _draw_model(box, model: Attention, heights: Sequence[float]) -> None:
    said = [model.name, _one_line(f"prompt: {model.prompt}"), _one_line(f"answer: {model.answer}")]
    box.suptitle("\n".join(said), x=0.02, ha="left", fontsize=10)
    axes = box.subplots(len(heights), _COLUMNS, squeeze=False, height_ratios=heights)
    marked = ranges(model.found)
    maps = axes[:-1].flat
    for axis in maps[len(model.layers) :]:
        axis.set_axis_off()
    shown = None
    for axis, layer in zip(maps, model.layers, strict=False):
        shown = _draw_map(axis, model.found.maps[layer].numpy(), f"layer {layer}", marked)
    if shown is not None:
        bar = box.colorbar(shown, ax=axes[:-1], fraction=0.03, extend="min", aspect=40)
        bar.set_label("attention probability")
    shares = model.shares
    text = {"image": shares.text_on_vision, "text": shares.text_on_text}
    vision = {"image": shares.vision_on_vision, "text": shares.vision_on_text}
    _draw_shares(axes[-1, 0], "text and answer attend to", text)
    _draw_shares(axes[-1, 1], "image attends to", vision)


def _draw_map(axis, values: np.ndarray, title: str, marked: Sequence[Range]):
    """A map with its ranges on top and on the right; returns its image, for a colour bar."""
    from matplotlib.colors import LogNorm

    length = len(values)
    future = np.triu(np.ones_like(values, dtype=bool), 1)
    shown = axis.imshow(
        np.ma.masked_array(np.maximum(values, _LEAST), future),
        norm=LogNorm(_LEAST, 1),
        cmap="magma_r",
        interpolation="nearest",
    )
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=20)
    axis.set_xlabel("position attended to")
    axis.set_ylabel("attending position")
    for each in marked[1:]:
        edge = each.start - 0.5
        axis.plot([edge, edge], [edge, length - 0.5], color="#1f2933", linewidth=0.8)
        axis.plot([-0.5, edge], [edge, edge], color="#1f2933", linewidth=0.8)
    top = axis.inset_axes([0, 1.012, 1, 0.025])
    right = axis.inset_axes([1.012, 0, 0.025, 1])
    for each in marked:
        color, width = _COLORS[each.kind], each.end - each.start
        top.barh(0, width, left=each.start, height=1, color=color)
        right.bar(0, width, bottom=each.start, width=1, color=color)
        if width >= _LABELLED * length:
            middle = (each.start + each.end) / 2
            top.text(middle, 0.9, each.kind, ha="center", va="bottom", color=color, fontsize=8)
            right.text(
                0.9,
                middle,
                each.kind,
                ha="left",
                va="center",
                color=color,
                fontsize=8,
                rotation=-90,
            )
    top.set(xlim=(0, length), ylim=(-0.5, 0.5))
    right.set(ylim=(length, 0), xlim=(-0.5, 0.5))
    top.set_axis_off()
    right.set_axis_off()
    return shown


def _draw_shares(axis, title: str, lines: dict) -> None:
    """Shares of attention, in percent, over the layers."""
    for kind, values in lines.items():
        layers = range(len(values))
        axis.plot(layers, 100 * values.numpy(), color=_COLORS[kind], marker="o", markersize=3)
        axis.plot([], [], color=_COLORS[kind], label=kind)
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel("layer")
    axis.set_ylabel("share, %")
    axis.set_ylim(-2, 102)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(color="#e4e7eb")
    axis.legend(fontsize=8, frameon=False, ncols=2)


def _one_line(text: str) -> str:
    """Text that fits a column; a dollar sign would start a formula."""
    plain = "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")
    return textwrap.shorten(plain, 100, placeholder=" ...")
