"""Images: close to Pillow, strict about damage, crops that depend on seed and sample index
alone."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_data import encoded, make_image

from megatron_owl2.data import images, pillow_images
from megatron_owl2.data.images import augment, decode, resize_square
from megatron_owl2.data.sampling.keyed_random import KeyedRandom
from megatron_owl2.errors import BadSampleError


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    assert a.dtype == b.dtype == torch.uint8 and a.shape == b.shape
    return (a.int() - b.int()).abs()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_lossless_formats_are_exact(kind):
    image = make_image(1)
    if kind == "GIF":
        image = image.quantize(64)
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(encoded(image, kind, **options))
    assert decoded.shape == (3, 30, 40)
    assert difference(decoded, pixels(image)).max() == 0


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_of_any_colour_space(mode, progressive):
    data = encoded(make_image(2, 64, 48).convert(mode), quality=90, progressive=progressive)
    reference = make_image(2, 64, 48).convert(mode).convert("RGB")
    assert difference(decode(data), pixels(reference)).float().mean() < 4


def test_transparency_is_laid_over_white():
    image = make_image(3).convert("RGBA")
    alpha = np.zeros((30, 40), dtype=np.uint8)
    alpha[:, 20:] = 255
    alpha[:5] = 128
    image.putalpha(Image.fromarray(alpha))
    colours = pixels(make_image(3)).float()
    weight = torch.from_numpy(alpha).float() / 255
    expected = colours * weight + 255 * (1 - weight)
    assert (decode(encoded(image, "PNG")).float() - expected).abs().max() <= 1


def test_transparent_palette_becomes_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 0)
    decoded = decode(encoded(image, "PNG", transparency=0))
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]
    assert decoded[:, 1, 1].tolist() == [10, 200, 30]


def test_sixteen_bit_grey_is_scaled():
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    decoded = decode(encoded(Image.fromarray(grey), "PNG"))
    assert decoded[0].flatten().tolist() == list(range(256))
    assert torch.equal(decoded[0], decoded[2])


def test_damaged_images_are_refused():
    jpeg = encoded(make_image(4, 200, 200), quality=90)
    noise = bytearray(jpeg)
    noise[-900:-300] = np.random.default_rng(0).integers(0, 255, 600, dtype=np.uint8).tobytes()
    png = encoded(make_image(4), "PNG")
    for data in (jpeg[:-400], jpeg[:30], bytes(noise), png[:-60], png[:40], b"", b"hello", b"<svg"):
        with pytest.raises(BadSampleError, match="cannot be decoded"):
            decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_before_decoding(kind, monkeypatch):
    data = encoded(make_image(5, 40, 30), kind)
    monkeypatch.setattr(pillow_images, "MAX_PIXELS", 40 * 30)
    assert decode(data).shape == (3, 30, 40)
    monkeypatch.setattr(pillow_images, "MAX_PIXELS", 40 * 30 - 1)
    with pytest.raises(BadSampleError, match="40 x 30 pixels exceeds"):
        decode(data)


@pytest.mark.parametrize("width, height, size", [(300, 200, 56), (30, 90, 56), (1, 1, 14)])
def test_resize_is_pillows_bicubic(width, height, size):
    image = make_image(6, width, height)
    resized = resize_square(decode(encoded(image, "PNG")), size)
    reference = pixels(image.resize((size, size), Image.BICUBIC))
    assert difference(resized, reference).max() <= 2


def test_an_image_of_the_right_size_is_untouched():
    image = make_image(7, 56, 56)
    assert torch.equal(resize_square(decode(encoded(image, "PNG")), 56), pixels(image))


def test_crops_depend_on_the_key_alone():
    image = decode(encoded(make_image(8, 80, 60), "PNG"))
    first = [augment(image, 32, KeyedRandom(1, sample_index)) for sample_index in range(20)]
    again = [
        augment(image, 32, KeyedRandom(1, sample_index)) for sample_index in reversed(range(20))
    ]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert len({a.numpy().tobytes() for a in first}) == 20
    shapes = {(a.shape, a.dtype, a.permute(1, 2, 0).is_contiguous()) for a in first}
    assert shapes == {((3, 32, 32), torch.uint8, True)}  # channels last in memory


def test_crops_have_the_papers_area_and_ratio():
    areas, ratios = [], []
    for sample_index in range(2000):
        top, left, height, width = images.random_crop(300, 400, KeyedRandom(2, sample_index))
        assert 0 <= top <= 300 - height and 0 <= left <= 400 - width
        areas.append(height * width / (300 * 400))
        ratios.append(width / height)
    assert 0.495 < min(areas) < 0.51 and 0.9 < max(areas) <= 1
    assert 0.74 < min(ratios) < 0.76 and 1.31 < max(ratios) < 1.35


def test_half_of_the_crops_are_flipped():
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64) * 3
    flipped = 0
    for sample_index in range(1000):
        crop = augment(ramp, 16, KeyedRandom(3, sample_index)).int()
        flipped += int(crop[0, 0, 0] > crop[0, 0, -1])
    assert 450 < flipped < 550


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 500), (3, 500, 1), (3, 3, 2)])
def test_odd_shapes_can_be_augmented(shape):
    image = torch.full(shape, 77, dtype=torch.uint8)
    for sample_index in range(50):
        assert torch.equal(
            augment(image, 8, KeyedRandom(4, sample_index)),
            torch.full((3, 8, 8), 77, dtype=torch.uint8),
        )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_not_applied(kind):
    """Neither do the official code and its CLIP processor: an image is what its pixels are."""
    image = make_image(4, 40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    plain, turned = (encoded(image, kind, **more) for more in ({}, {"exif": exif}))
    assert len(turned) > len(plain)
    assert decode(turned).shape == (3, 20, 40)
    assert torch.equal(decode(turned), decode(plain))


@pytest.mark.parametrize("kind, options", [("GIF", {}), ("WEBP", {"lossless": True})])
def test_an_animation_is_its_first_frame(kind, options):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    assert torch.equal(decode(data), pixels(frames[0]))


def test_palette_images_become_rgb():
    image = make_image(5).quantize(17)
    assert image.mode == "P"
    assert torch.equal(decode(encoded(image, "PNG")), pixels(image.convert("RGB")))


@pytest.mark.parametrize("width, height", [(1, 5_000_000), (5_000_000, 1)])
def test_a_line_of_pixels_is_refused(width, height):
    """Its area is small, but resizing it would take gigabytes."""
    data = encoded(Image.new("L", (width, height)), "PNG")
    with pytest.raises(BadSampleError, match=f"{width} x {height} pixels exceeds"):
        decode(data)


def test_a_jpeg_of_endless_scans_is_refused():
    data = encoded(make_image(7), "JPEG", progressive=True)
    scan = data.index(b"\xff\xda")
    assert decode(data).shape == (3, 30, 40)
    with pytest.raises(BadSampleError, match="more than 100 scans"):
        decode(data[:-2] + data[scan : scan + 20] * 100 + data[-2:])


def test_a_jpeg_of_endless_colours_is_refused():
    """A sequential one, too, if its first scan says that others follow."""
    data = encoded(make_image(7), "JPEG")
    head = data[: data.index(b"\xff\xda")]
    alone = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + bytes(20)
    with pytest.raises(BadSampleError, match="more than 100 scans"):
        decode(head + alone * 101 + data[-2:])
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        decode(head + alone * 100 + data[-2:])


def test_scans_are_not_looked_for_in_the_metadata():
    """A camera's notes may hold any bytes."""
    data = encoded(make_image(7), "JPEG")
    notes = b"\xff\xda" * 200
    segment = b"\xff\xed" + (2 + len(notes)).to_bytes(2) + notes
    assert torch.equal(decode(data[:2] + segment + data[2:]), decode(data))


def test_transparent_sixteen_bit_grey_is_white():
    image = Image.fromarray(np.array([[300, 40_000]], dtype=np.uint16))
    plain, clear = (encoded(image, "PNG", **more) for more in ({}, {"transparency": 300}))
    assert decode(plain)[0].tolist() == [[1, 156]]
    assert decode(clear)[0].tolist() == [[255, 156]]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_without_a_white_are_refused(kind):
    image = Image.fromarray(np.array([[0, 70_000]], dtype=kind))
    with pytest.raises(BadSampleError, match="32-bit"):
        decode(encoded(image, "TIFF"))


def test_bombs_in_the_metadata_are_refused():
    """A PNG whose compressed text grows a thousandfold, as Pillow's own limit sees it."""
    text = PngInfo()
    text.add_text("comment", "a" * (64 * 2**20), zip=True)
    data = encoded(make_image(6), "PNG", pnginfo=text)
    assert len(data) < 2**18
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        decode(data)
