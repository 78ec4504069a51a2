"""Images stretched, padded and cropped to the model's square, against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_data import encoded, make_image

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.data.image_resize import SquareResize
from megatron_owl2.data.images import augment, decode, load_square, square_resize
from megatron_owl2.data.sampling.keyed_random import KeyedRandom

MODEL = ModelConfig()
COLOUR = (122, 116, 104)  # int(mean * 255) of CLIP's mean, as the official code has it
PAD, CROP = (square_resize(ModelConfig(image_mode=mode)) for mode in ("pad", "crop"))
SIDES = [(300, 200), (200, 300), (30, 90), (91, 30), (57, 56), (56, 56), (1, 1), (640, 37)]


def pillow_pad(image: Image.Image, size: int) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def pillow_crop(image: Image.Image, size: int) -> Image.Image:
    shorter = min(image.size)
    whole = tuple(int(size * side / shorter) for side in image.size)
    left, top = ((side - size) // 2 for side in whole)
    resized = image.resize(whole, Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def apart(ours: torch.Tensor, theirs: Image.Image) -> int:
    assert ours.dtype == torch.uint8
    return np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs, int)).max()


@pytest.mark.parametrize("width, height", SIDES)
def test_padding_and_cropping_are_pillows(width, height):
    image = make_image(6, width, height)
    data = encoded(image, "PNG")
    assert apart(load_square(data, 56, to_square=PAD), pillow_pad(image, 56)) <= 2
    assert apart(load_square(data, 56, to_square=CROP), pillow_crop(image, 56)) <= 2


def test_sharp_edges_of_wide_images_are_pillows_too():
    """Enlarged, they overshoot black and white, and are cut off there after every pass."""
    noise = np.random.default_rng(0).integers(0, 2, (30, 91, 3), dtype=np.uint8) * 255
    image = Image.fromarray(noise)
    assert apart(PAD(decode(encoded(image, "PNG")), 56), pillow_pad(image, 56)) <= 2
    assert apart(CROP(decode(encoded(image, "PNG")), 56), pillow_crop(image, 56)) <= 2


def test_bands_have_the_mean_colour_and_the_image_is_in_the_middle():
    white = torch.full((3, 20, 40), 255, dtype=torch.uint8)
    padded = PAD(white, 40)
    assert padded[:, [0, 9, 30, 39]].unique(dim=1).unique(dim=2).flatten().tolist() == [*COLOUR]
    assert (padded[:, 10:30] == 255).all()
    assert torch.equal(PAD(white.mT, 40), padded.mT)
    assert SquareResize("pad", (-0.5, 0.25, 1.5))(white, 40)[:, 0, 0].tolist() == [0, 63, 255]


@pytest.mark.parametrize("to_square", [PAD, CROP], ids=["pad", "crop"])
@pytest.mark.parametrize("shape", [(1, 65_535), (65_535, 1)])
def test_a_line_of_pixels_is_no_burden(to_square, shape):
    """Its square would take 12 GB, and so would all of it at the model's height."""
    image = torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, *shape)
    assert to_square(image, 56).shape == (3, 56, 56)


@pytest.mark.parametrize("to_square", [PAD, CROP], ids=["pad", "crop"])
def test_scaled_decoding_covers_the_square(to_square):
    data = encoded(make_image(9, 800, 480), quality=95)
    exact, scaled = (load_square(data, 56, None, s, to_square).int() for s in (False, True))
    assert 0 < (exact - scaled).abs().max() <= 6
    exact, scaled = (load_square(data, 448, None, s, to_square) for s in (False, True))
    assert torch.equal(exact, scaled)  # half of its height does not cover 448


def test_augmentation_is_the_same_in_every_mode():
    data = encoded(make_image(10, 80, 60), "PNG")
    expected = augment(decode(data), 32, KeyedRandom(3))
    for to_square in (SquareResize(), PAD, CROP):
        assert torch.equal(load_square(data, 32, KeyedRandom(3), to_square=to_square), expected)


def test_the_default_stretches():
    image = make_image(11, 90, 30)
    assert square_resize(MODEL).mode == "stretch"
    stretched = load_square(encoded(image, "PNG"), 56)
    assert apart(stretched, image.resize((56, 56), Image.Resampling.BICUBIC)) <= 2
    with pytest.raises(ValueError, match="image_mode is 'squash'; use stretch, pad or crop"):
        SquareResize("squash")
