"""Sample sheet: samples as the model gets them, pixels after augmentation and text as tokens."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from megatron_owl2.data.batch import Batch
from megatron_owl2.data.image_tokens import VISION
from megatron_owl2.data.tokenizer import Tokenizer

_MOST = 8  # samples of a sheet
_SIDE, _TEXT, _MARGIN = 224, 640, 12  # pixels
_SIZE, _LINE = 14, 19  # of letters and from line to line
_INK, _FAINT, _TARGET = "#1f2933", "#7b8794", "#0f7b3e"


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
    rows = range(min(_MOST, len(batch.tokens)))
    owned = _images(batch)
    texts = [_wrapped(_words(batch, row, tokenizer), font) for row in rows]
    heights = [max(_SIDE, _LINE * (len(lines) + 1)) + _MARGIN for lines in texts]
    page = Image.new("RGB", (_SIDE + _TEXT + 3 * _MARGIN, sum(heights) + _MARGIN), "white")
    pen = ImageDraw.Draw(page)
    top = _MARGIN
    for row, lines, height in zip(rows, texts, heights, strict=True):
        page.paste(_thumbnail(owned.get(row)), (_MARGIN, top))
        left = _SIDE + 2 * _MARGIN
        head = (
            f"{batch.keys[row]}, data set {batch.sources[row]}, sample {batch.sample_indices[row]}"
        )
        pen.text((left, top), head, _FAINT, font)
        for number, line in enumerate(lines, 1):
            for x, word, color in line:
                pen.text((left + x, top + _LINE * number), word, color, font)
        top += height
    return page


def _images(batch: Batch) -> dict[int, torch.Tensor]:
    """The image of each row that has one: those of `image` that own rows come in their order."""
    count, rows = len(batch.vision_token_index), len(batch.tokens)
    if not count:
        return {}
    each = int(batch.modality.sum(1).max())  # tokens of one image
    owners = (batch.vision_token_index[::each] % rows).tolist()
    return dict(zip(owners, batch.image, strict=True))


def _thumbnail(pixels: torch.Tensor | None) -> Image.Image:
    if pixels is None:
        return Image.new("RGB", (_SIDE, _SIDE), "black")
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((_SIDE, _SIDE))


def _words(batch: Batch, row: int, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Words and their colours; tokens of the same kind are decoded together."""
    length = int(batch.lengths[row])
    learnt = torch.zeros(length, dtype=torch.bool)
    learnt[1:] = batch.loss_mask[row, : length - 1] > 0  # labels are shifted by one
    vision = batch.modality[row, :length] == VISION
    kinds = [
        _FAINT if seen else (_TARGET if target else _INK)
        for seen, target in zip(vision.tolist(), learnt.tolist(), strict=True)
    ]
    words, start = [], 0
    for stop in range(1, length + 1):
        if stop < length and kinds[stop] == kinds[start]:
            continue
        if kinds[start] == _FAINT:
            text = f"[{stop - start} vision tokens]"
        else:
            text = tokenizer.decode(batch.tokens[row, start:stop].tolist(), skip_special=False)
        words += [(word, kinds[start]) for word in text.split()]
        start = stop
    return words


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
