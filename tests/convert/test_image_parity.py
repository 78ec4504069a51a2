"""One table of images, by mode and format, which training, generation and the exported processor
read alike: the same pixels, or the same refusal."""

import base64
import io

import numpy as np
import pytest
import torch
from exported_images import exported_module, pixels_of
from PIL import Image, ImagePalette
from tiny_data import encoded, make_image

from megatron_owl2.data.images import decode
from megatron_owl2.errors import BadSampleError, InferenceError
from megatron_owl2.inference.api import read_image

WIDTH, HEIGHT = 40, 30
IMAGE = make_image(3, WIDTH, HEIGHT)
RAMP = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
WITHOUT_WHITE = "image of 32-bit numbers, whose white is unknown"


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    with exported_module(tmp_path_factory.mktemp("export")) as module:
        yield module


@pytest.fixture(scope="module")
def process(module):
    return pixels_of(module, HEIGHT, WIDTH)


def transparent(image: Image.Image = IMAGE) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray((RAMP % 256).astype(np.uint8)))
    return image


def over_white(image: Image.Image) -> np.ndarray:
    """Transparency over white, in floating point."""
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    weight = pixels[..., 3:] / 255
    return pixels[..., :3] * weight + 255 * (1 - weight)


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(float)


def with_info(image: Image.Image, **info) -> Image.Image:
    image = image.copy()
    image.info |= info
    return image


def palette_with_alpha() -> Image.Image:
    image = Image.fromarray((RAMP % 4).astype(np.uint8)).convert("P")
    colours = [255, 0, 0, 255, 0, 255, 0, 128, 0, 0, 255, 0, 9, 9, 9, 255]
    image.palette = ImagePalette.ImagePalette("RGBA", bytes(colours))
    image.putpalette(colours, "RGBA")
    return image


def sixteen_bits(order: str) -> Image.Image:
    mode, kind = ("I;16B", ">u2") if order == "B" else ("I;16", "<u2")
    grey = (RAMP * 54).astype(kind)
    return Image.frombytes(mode, (WIDTH, HEIGHT), grey.tobytes())


GREY = np.repeat(np.asarray(IMAGE.convert("L"))[..., None], 3, 2).astype(float)
UPPER_BITS = np.repeat((RAMP * 54 // 256)[..., None], 3, 2).astype(float)
COLOURS = IMAGE.quantize(17)
CLEAR = np.where((np.asarray(COLOURS) == 2)[..., None], 255.0, rgb(COLOURS))
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT), "blue")]}

# Name: (image, format of its file and options, expected pixels or words of the refusal, tolerance
# against them). Between the three paths there is no tolerance.
FILES = {
    "1 PNG": (IMAGE.convert("1"), ("PNG", {}), rgb(IMAGE.convert("1")), 0),
    "1 TIFF": (IMAGE.convert("1"), ("TIFF", {}), rgb(IMAGE.convert("1")), 0),
    "L PNG": (IMAGE.convert("L"), ("PNG", {}), GREY, 0),
    "L PNG with a transparent grey": (
        Image.fromarray((RAMP % 256).astype(np.uint8)),
        ("PNG", {"transparency": 7}),
        np.repeat(np.where(RAMP % 256 == 7, 255, RAMP % 256)[..., None], 3, 2).astype(float),
        0,
    ),
    "L BMP": (IMAGE.convert("L"), ("BMP", {}), GREY, 0),
    "LA PNG": (
        transparent(IMAGE.convert("L")),
        ("PNG", {}),
        over_white(transparent(IMAGE.convert("L"))),
        1,
    ),
    "LA TIFF": (
        transparent(IMAGE.convert("L")),
        ("TIFF", {}),
        over_white(transparent(IMAGE.convert("L"))),
        1,
    ),
    "P PNG": (COLOURS, ("PNG", {}), rgb(COLOURS), 0),
    "P PNG with a transparent colour": (COLOURS, ("PNG", {"transparency": 2}), CLEAR, 0),
    "P PNG with an alpha for each colour": (
        COLOURS,
        ("PNG", {"transparency": bytes([255, 255, 0]) + bytes([255] * 14)}),
        CLEAR,
        0,
    ),
    "P GIF": (COLOURS, ("GIF", {}), rgb(COLOURS), 0),
    "P GIF with a transparent colour": (COLOURS, ("GIF", {"transparency": 2}), CLEAR, 0),
    "P TIFF": (COLOURS, ("TIFF", {}), rgb(COLOURS), 0),
    "RGB PNG": (IMAGE, ("PNG", {}), rgb(IMAGE), 0),
    "RGB PNG with a transparent colour": (
        Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)),
        ("PNG", {"transparency": (1, 2, 3)}),
        np.full((HEIGHT, WIDTH, 3), 255.0),
        0,
    ),
    "RGB WebP": (IMAGE, ("WEBP", {"lossless": True}), rgb(IMAGE), 0),
    "RGB lossy WebP": (IMAGE, ("WEBP", {"quality": 95}), rgb(IMAGE), 24),
    "RGB BMP": (IMAGE, ("BMP", {}), rgb(IMAGE), 0),
    "RGB TIFF of deflate": (IMAGE, ("TIFF", {"compression": "tiff_adobe_deflate"}), rgb(IMAGE), 0),
    "RGBA PNG": (transparent(), ("PNG", {}), over_white(transparent()), 1),
    "RGBA WebP": (
        transparent(),
        ("WEBP", {"lossless": True, "exact": True}),
        over_white(transparent()),
        1,
    ),
    "RGBA TIFF": (transparent(), ("TIFF", {}), over_white(transparent()), 1),
    "RGBX TIFF": (IMAGE.convert("RGBX"), ("TIFF", {}), rgb(IMAGE), 0),
    "CMYK TIFF": (IMAGE.convert("CMYK"), ("TIFF", {}), rgb(IMAGE), 1),
    "YCbCr TIFF": (IMAGE.convert("YCbCr"), ("TIFF", {}), rgb(IMAGE), 3),
    "LAB TIFF": (Image.new("LAB", (WIDTH, HEIGHT), (255, 0, 0)), ("TIFF", {}), 255, 1),
    "I;16 PNG": (sixteen_bits("L"), ("PNG", {}), UPPER_BITS, 0),
    "I;16 PNG with a transparent grey": (
        sixteen_bits("L"),
        ("PNG", {"transparency": 54}),
        np.where((RAMP == 1)[..., None], 255.0, UPPER_BITS),
        0,
    ),
    "I;16 TIFF": (sixteen_bits("L"), ("TIFF", {}), UPPER_BITS, 0),
    "I;16B TIFF": (sixteen_bits("B"), ("TIFF", {}), UPPER_BITS, 0),
    "I TIFF": (Image.fromarray(RAMP.astype(np.int32)), ("TIFF", {}), WITHOUT_WHITE, 0),
    "F TIFF": (Image.fromarray(RAMP.astype(np.float32)), ("TIFF", {}), WITHOUT_WHITE, 0),
    "L JPEG": (IMAGE.convert("L"), ("JPEG", {"quality": 95}), GREY, 8),
    "RGB JPEG": (IMAGE, ("JPEG", {"quality": 95}), rgb(IMAGE), 30),
    "RGB JPEG 4:4:4": (IMAGE, ("JPEG", {"quality": 95, "subsampling": 0}), rgb(IMAGE), 12),
    "RGB progressive JPEG": (IMAGE, ("JPEG", {"progressive": True}), rgb(IMAGE), 60),
    "RGB JPEG of RGB": (IMAGE, ("JPEG", {"quality": 95, "keep_rgb": True}), rgb(IMAGE), 12),
    "CMYK JPEG": (IMAGE.convert("CMYK"), ("JPEG", {"quality": 95}), rgb(IMAGE), 24),
    "CMYK JPEG with black": (
        Image.merge("CMYK", [*IMAGE.split(), IMAGE.convert("L")]),
        ("JPEG", {"quality": 98}),
        rgb(Image.merge("CMYK", [*IMAGE.split(), IMAGE.convert("L")])),
        24,
    ),
    "CMYK JPEG of an odd subsampling": (
        IMAGE.convert("CMYK"),
        ("JPEG", {"quality": 95, "subsampling": 2}),
        rgb(IMAGE),
        80,
    ),
    "animated GIF": (COLOURS, ("GIF", FRAMES), rgb(COLOURS), 0),
    "animated WebP": (IMAGE, ("WEBP", FRAMES | {"lossless": True}), rgb(IMAGE), 0),
    "animated PNG": (IMAGE, ("PNG", FRAMES), rgb(IMAGE), 0),
    "TIFF of pages": (IMAGE, ("TIFF", FRAMES), rgb(IMAGE), 0),
    "MPO": (IMAGE, ("MPO", FRAMES | {"quality": 95}), rgb(IMAGE), 30),
}
# Images that no file that is read holds: (image, expected pixels or words, tolerance).
MADE = {
    "La": (
        transparent(IMAGE.convert("L")).convert("La"),
        over_white(transparent(IMAGE.convert("L"))),
        3,
    ),
    "PA": (COLOURS.convert("PA"), rgb(COLOURS), 0),
    "RGBa": (transparent().convert("RGBa"), over_white(transparent()), 3),
    "HSV": (IMAGE.convert("HSV"), rgb(IMAGE), 12),
    "1 with a transparent white": (
        with_info(Image.new("1", (WIDTH, HEIGHT)), transparency=0),
        255,
        0,
    ),
    "P of colours with alpha": (palette_with_alpha(), over_white(palette_with_alpha()), 1),
    "I;16L": (
        Image.frombytes("I;16L", (WIDTH, HEIGHT), sixteen_bits("L").tobytes()),
        UPPER_BITS,
        0,
    ),
    "I;16N": (
        Image.frombytes("I;16N", (WIDTH, HEIGHT), sixteen_bits("L").tobytes()),
        UPPER_BITS,
        0,
    ),
    "I": (Image.new("I", (WIDTH, HEIGHT), 70_000), WITHOUT_WHITE, 0),
    "F": (Image.new("F", (WIDTH, HEIGHT), 0.5), WITHOUT_WHITE, 0),
    "I of numbers below 65536": (Image.new("I", (WIDTH, HEIGHT), 300), WITHOUT_WHITE, 0),
}


def outcome(read, *arguments):
    """Pixels, or the words of a refusal without the name of the file."""
    try:
        return read(*arguments)
    except (BadSampleError, InferenceError, ValueError) as error:
        return str(error)


def assert_alike(outcomes: dict, expected, tolerance: int) -> None:
    first = next(iter(outcomes.values()))
    for path, found in outcomes.items():
        if isinstance(expected, str):
            assert isinstance(found, str) and found.endswith(expected), path
        else:
            assert not isinstance(found, str), (path, found)
            assert torch.equal(found, first), path
    if not isinstance(expected, str):
        difference = np.abs(first.permute(1, 2, 0).numpy() - expected).max()
        assert difference <= tolerance, difference


@pytest.mark.parametrize("name", FILES)
def test_a_file_shows_every_path_the_same(name, process, tmp_path):
    image, (kind, options), expected, tolerance = FILES[name]
    path = tmp_path / "image"
    path.write_bytes(encoded(image, kind, **options))
    with Image.open(path) as first, Image.open(path) as second:
        outcomes = {
            "training": outcome(decode, path.read_bytes()),
            "generation, path": outcome(read_image, path),
            "generation, Pillow": outcome(read_image, first),
            "processor, path": outcome(process, str(path)),
            "processor, Path": outcome(process, path),
            "processor, Pillow": outcome(process, second),
            "processor, base64": outcome(process, base64.b64encode(path.read_bytes()).decode()),
        }
    assert_alike(outcomes, expected, tolerance)


@pytest.mark.parametrize("name", MADE)
def test_an_image_of_pillow_shows_both_paths_the_same(name, process):
    image, expected, tolerance = MADE[name]
    outcomes = {"generation": outcome(read_image, image), "processor": outcome(process, image)}
    assert_alike(outcomes, expected, tolerance)


def test_a_sixteen_bit_png_of_an_older_pillow_keeps_its_upper_bits(process):
    """It opened as numbers of 32 bits."""
    with Image.open(io.BytesIO(encoded(sixteen_bits("L"), "PNG"))) as opened:
        older = opened.convert("I")
    older.format = "PNG"
    for read in (read_image, process):
        assert torch.equal(read(older).permute(1, 2, 0).double(), torch.from_numpy(UPPER_BITS))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_path_turns_an_image(kind, process, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    path = tmp_path / "image"
    path.write_bytes(encoded(IMAGE, kind, exif=exif))
    with Image.open(path) as image:
        assert image.getexif()[0x0112] == 6 and image.size == (WIDTH, HEIGHT)
    pixels = decode(path.read_bytes())
    assert pixels.shape == (3, HEIGHT, WIDTH)
    assert torch.equal(process(str(path)), pixels) and torch.equal(read_image(path), pixels)


def test_a_tiff_is_turned_by_pillow_on_every_path(module, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "image"
    path.write_bytes(encoded(IMAGE, "TIFF", exif=exif))
    turned = torch.from_numpy(np.array(IMAGE.rotate(-90, expand=True))).permute(2, 0, 1)
    assert turned.shape == (3, WIDTH, HEIGHT)
    with Image.open(path) as image:
        for read, source in ((read_image, path), (read_image, image)):
            assert torch.equal(read(source), turned)
    assert torch.equal(pixels_of(module, WIDTH, HEIGHT)(str(path)), turned)
    assert torch.equal(decode(path.read_bytes()), turned)
