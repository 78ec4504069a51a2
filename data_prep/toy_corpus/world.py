"""World of the embedded corpus: scenes of coloured shapes and a letter, and their images.

An image has 2x2 cells of 28 px. Six colour-shape pairs never occur in training, so that a model
can be asked about combinations it has never seen of attributes it has seen.
"""

import functools
import io
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 56
CELL = IMAGE_SIZE // 2
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
COLORS = {
    "red": (232, 48, 44),
    "green": (48, 190, 68),
    "blue": (58, 98, 246),
    "yellow": (246, 226, 60),
    "purple": (172, 66, 222),
    "cyan": (64, 220, 232),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
LETTERS = tuple("BCEHKLRTXZ")  # easy to tell apart at 21 px; no A, which VQA scoring drops
LETTER_COLOR = (235, 235, 235)

# Every colour and every shape keeps at least three partners in training.
HELD_OUT = (
    ("red", "square"),
    ("green", "star"),
    ("blue", "triangle"),
    ("yellow", "circle"),
    ("purple", "cross"),
    ("cyan", "square"),
)
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
TRAINING_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

_SUPERSAMPLING = 4
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class Shape:
    """Coloured shape in cell 0..3 (the index of its name in POSITIONS)."""

    cell: int
    color: str
    shape: str

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape), as in PAIRS."""
        return self.color, self.shape


@dataclass(frozen=True)
class Letter:
    """Capital letter as scene text in cell 0..3."""

    cell: int
    text: str


@dataclass(frozen=True)
class Scene:
    """Content of an image: none to two shapes, and a letter or None; at least one of them."""

    shapes: tuple[Shape, ...]
    letter: Letter | None

    @property
    def held_out(self) -> tuple[int, ...]:
        """Indices of the shapes that are a held-out pair; empty for every training scene."""
        return tuple(i for i, shape in enumerate(self.shapes) if shape.pair in HELD_OUT)


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """Random scene: 45 % one shape, 35 % two, 20 % only a letter; a letter in half of all scenes.

    With `held_out` the scene has one or two shapes, the first one drawn is a held-out pair and the
    other one a training pair.
    """
    number = rng.choices((1, 2, 0), (45, 35, 0 if held_out else 20))[0]
    with_letter = number == 0 or rng.random() < 3 / 8  # .2 + .8 * 3/8 = half of the scenes
    return _compose(rng, number, with_letter, held_out)


def sample_crowd(rng: random.Random) -> Scene:
    """Random scene for a text: two shapes or three, and a letter in half of them."""
    return _compose(rng, rng.choice((2, 3)), rng.random() < 0.5)


def _compose(rng: random.Random, number: int, with_letter: bool, held_out: bool = False) -> Scene:
    """Random scene of `number` shapes, the first one drawn a held-out pair if `held_out` is set."""
    cells = rng.sample(range(4), number + with_letter)
    pairs = [rng.choice(TRAINING_PAIRS) for _ in range(number)]
    if held_out:
        pairs[0] = rng.choice(HELD_OUT)
    letter = Letter(cells[-1], rng.choice(LETTERS)) if with_letter else None
    shapes = (Shape(cell, *pair) for cell, pair in zip(cells, pairs, strict=False))
    return Scene(tuple(sorted(shapes, key=lambda shape: shape.cell)), letter)


def draw_image(seed: int, split: str, index: int, held_out: bool = False) -> tuple[Scene, bytes]:
    """Image number `index` of a split as (scene, JPEG bytes); depends on the arguments only."""
    rng = random.Random(f"{seed}/{split}/{index}")
    scene = sample_scene(rng, held_out)
    buffer = io.BytesIO()
    # Chroma subsampling would leave a shape's colour 14 pixels wide.
    render(scene, rng).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return scene, buffer.getvalue()


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """RGB image (56x56) of a scene; sizes, offsets, shades and background come from `rng`."""
    side = IMAGE_SIZE * _SUPERSAMPLING
    background = tuple(rng.randint(8, 48) for _ in range(3))
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        x, y, half = _place(shape.cell, rng)
        color = tuple(min(max(c + rng.randint(-10, 10), 0), 255) for c in COLORS[shape.color])
        if shape.shape == "circle":
            draw.ellipse((x - half, y - half, x + half, y + half), fill=color)
        else:
            draw.polygon([(x + half * u, y + half * v) for u, v in _OUTLINES[shape.shape]], color)
    if scene.letter is not None:
        x, y, half = _place(scene.letter.cell, rng)
        # A capital of this font is 0.7 of its size high; this one fills 2 * half.
        font = _font(round(2 * half / 0.7))
        left, top, right, bottom = font.getbbox(scene.letter.text)
        corner = (x - (left + right) / 2, y - (top + bottom) / 2)
        draw.text(corner, scene.letter.text, LETTER_COLOR, font)
    return image.reduce(_SUPERSAMPLING)


def _place(cell: int, rng: random.Random) -> tuple[float, float, float]:
    """Centre and half-size of a cell's content, in pixels of the supersampled canvas."""
    cell_size = CELL * _SUPERSAMPLING
    half = rng.uniform(0.38, 0.46) * cell_size
    jitter = 0.25 * (cell_size - 2 * half)
    x = (cell % 2 + 0.5) * cell_size + rng.uniform(-jitter, jitter)
    y = (cell // 2 + 0.5) * cell_size + rng.uniform(-jitter, jitter)
    return x, y, half


def _star() -> tuple[tuple[float, float], ...]:
    """Five-pointed star in the unit circle, one point up; y grows downwards."""
    radii = (1.0, 0.42) * 5
    angles = (math.pi * (i / 5 - 0.5) for i in range(10))
    return tuple((r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True))


_T = 0.32  # half the thickness of the cross's bars
_OUTLINES = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -1), (1, 1), (-1, 1)),
    "cross": (
        *((-_T, -1), (_T, -1), (_T, -_T), (1, -_T), (1, _T), (_T, _T)),
        *((_T, 1), (-_T, 1), (-_T, _T), (-1, _T), (-1, -_T), (-_T, -_T)),
    ),
    "star": _star(),
}


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, so that the corpus needs none of the system's."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow has FreeType built in
    return font
