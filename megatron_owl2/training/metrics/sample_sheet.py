"""Sample sheet: samples as the model gets them, pixels after augmentation and text as tokens."""

import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from megatron_owl2.data.batch import Batch
from megatron_owl2.data.spans import spans_of
from megatron_owl2.data.tokenizer import Tokenizer

_MOST = 8  # samples of a sheet
_SIDE, _TEXT, _MARGIN = 224, 640, 12  # pixels
_SIZE, _LINE = 14, 19  # of letters and from line to line
_INK, _FAINT, _TARGET = "#1f2933", "#7b8794", "#0f7b3e"
_COLORS = {"given": _INK, "learnt": _TARGET, "vision": _FAINT}


def write(output: Path, step: int, batch: Batch, tokenizer: Tokenizer) -> Path:
    """Draw `batch` as RUN/pictures/step_<step>.png; returns that path."""
    path = Path(output) / "pictures" / f"step_{step:07d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(batch, tokenizer).save(path)
    return path


def draw(batch: Batch, tokenizer: Tokenizer) -> Image.Image:
    """The first samples of a batch, one below the other: the image (black for none) and beside it
    key, data set and text, with what is learnt in green and the row of the image's tokens as
    their number. `batch` is whole, and its pixels are uint8."""
    font = ImageFont.load_default(_SIZE)
    shown = _samples(batch)[:_MOST]
    texts = [_wrapped(_words(batch, sample, tokenizer), font) for sample in shown]
    sides = [_SIDE * max(1, len(sample.images)) for sample in shown]
    heights = [
        max(side, _LINE * (len(lines) + 1)) + _MARGIN
        for side, lines in zip(sides, texts, strict=True)
    ]
    page = Image.new("RGB", (_SIDE + _TEXT + 3 * _MARGIN, sum(heights) + _MARGIN), "white")
    pen = ImageDraw.Draw(page)
    top = _MARGIN
    for sample, lines, height in zip(shown, texts, heights, strict=True):
        for number, pixels in enumerate(sample.images or [None]):
            page.paste(_thumbnail(pixels), (_MARGIN, top + number * _SIDE))
        left = _SIDE + 2 * _MARGIN
        index = batch.sample_indices[sample.row]
        head = f"{sample.key}, data set {sample.source}, row {index}"
        pen.text((left, top), head, _FAINT, font)
        for number, line in enumerate(lines, 1):
            for x, word, color in line:
                pen.text((left + x, top + _LINE * number), word, color, font)
        top += height
    return page


class _Shown(NamedTuple):
    """A sample of a batch: its key and data set, its row and the positions in it, its images."""

    key: str
    source: int
    row: int
    positions: slice
    images: list[torch.Tensor]


def _samples(batch: Batch) -> list[_Shown]:
    """The samples of a batch; images come in their order."""
    images = iter(batch.image)
    owned = len(batch.vision_token_index)
    each = owned // len(batch.image) if owned else 1  # tokens of one image
    keys, lengths = iter(batch.keys), iter(batch.sample_lengths)
    sources = iter(batch.sources.tolist())
    found = []
    for row, count in enumerate(batch.samples_per_row):
        start = 0
        for _ in range(count):
            positions = slice(start, start := start + next(lengths))
            tokens = int(batch.modality[row, positions].sum())
            pixels = list(itertools.islice(images, tokens // each))
            found.append(_Shown(next(keys), next(sources), row, positions, pixels))
    return found


def _thumbnail(pixels: torch.Tensor | None) -> Image.Image:
    if pixels is None:
        return Image.new("RGB", (_SIDE, _SIDE), "black")
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((_SIDE, _SIDE))


def _words(batch: Batch, sample: _Shown, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Words and their colours."""
    row, positions = sample.row, sample.positions
    modality = batch.modality[row, positions]
    each = int(modality.sum()) // len(sample.images) if sample.images else 1
    spans = spans_of(
        batch.tokens[row, positions], batch.labels[row, positions], modality, each, tokenizer
    )
    return [(word, _COLORS[span.kind]) for span in spans for word in span.text.split()]


def _wrapped(words: list[tuple[str, str]], font) -> list[list[tuple[float, str, str]]]:
    """Lines of (distance from the left, word, colour)."""
    space = font.getlength(" ")
    lines, x = [[]], 0.0
    for word, color in words:
        width = font.getlength(word)
        if x + width > _TEXT and lines[-1]:
            lines.append([])
            x = 0.0
        lines[-1].append((x, word, color))
        x += width + space
    return lines
