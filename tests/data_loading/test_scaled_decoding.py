"""Scaled decoding of JPEGs: the crops, places and refusals of the exact path, nearly its pixels."""

import random

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from streams import config, loader, rows_of
from tiny_data import encoded, make_image, write

from megatron_owl2.data import jpeg
from megatron_owl2.data.images import check, decode, load_square, random_crop, reduce_crop
from megatron_owl2.data.sampling.keyed_random import KeyedRandom
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import BadSampleError

IMAGE = make_image(3, 163, 125)
JPEGS = {
    "4:4:4": encoded(IMAGE, quality=90, subsampling=0),
    "4:2:2": encoded(IMAGE, quality=90, subsampling=1),
    "4:2:0": encoded(IMAGE, quality=90, subsampling=2),
    "4:4:0": simplejpeg.encode_jpeg(np.asarray(IMAGE), 90, "RGB", "440"),
    "4:1:1": simplejpeg.encode_jpeg(np.asarray(IMAGE), 90, "RGB", "411"),
    "progressive": encoded(IMAGE, quality=90, progressive=True),
    "restarts": encoded(IMAGE, quality=90, restart_marker_blocks=2),
    "grey": encoded(IMAGE.convert("L"), quality=90),
    "CMYK": encoded(IMAGE.convert("CMYK"), quality=90),
}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean absolute difference in levels of 255."""
    return (a.float() - b.float()).abs().mean().item()


def waves(width: int, height: int, period: float) -> Image.Image:
    """Grey waves to the right and down, of 100 levels around 128."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    grey = 128 + 50 * (np.sin(2 * np.pi * x / period) + np.sin(2 * np.pi * y / period))
    return Image.fromarray(np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_smaller_scale_is_the_mean_of_the_pixels_it_covers(name, factor):
    """In place, and in colour too unless it is subsampled in one direction alone."""
    small, whole = jpeg.decode(JPEGS[name], factor), jpeg.decode(JPEGS[name])
    assert whole.shape == (125, 163, 3)
    assert small.shape == (-(-125 // factor), -(-163 // factor), 3)
    rows, columns = 125 // factor, 163 // factor
    blocks = whole[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
    means = torch.from_numpy(blocks.mean(axis=(1, 3)))
    small = torch.from_numpy(small[:rows, :columns])
    assert difference(small, means) < (13 if name in ("4:2:2", "4:4:0", "4:1:1") else 0.6)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    small, means = small.double() @ luma, means @ luma
    near = difference(small, means)
    assert near < 1
    assert difference(small[:, 1:], means[:, :-1]) > 4 * near
    assert difference(small[1:], means[:-1]) > 4 * near


def test_the_smallest_scale_that_covers_is_taken():
    whole = 0, 0, 960, 1280
    sizes = {120: 8, 121: 4, 240: 4, 241: 2, 480: 2, 481: 1}
    assert {size: reduce_crop(whole, size)[0] for size in sizes} == sizes
    assert reduce_crop((4, 8, 100, 301), 50) == (2, (2, 4, 50, 150))
    assert reduce_crop((4, 8, 99, 301), 50) == (2, (2, 4, 50, 150))  # 51.5 becomes 52
    assert reduce_crop((4, 8, 98, 301), 50) == (1, (4, 8, 98, 301))


@pytest.mark.parametrize(
    "height, width, size", [(961, 1283, 224), (3001, 2003, 224), (481, 643, 31)]
)
def test_crops_stay_in_place_on_average(height, width, size):
    edges = {2: [], 4: [], 8: []}
    for index in range(3000):
        crop = top, left, rows, columns = random_crop(height, width, KeyedRandom(5, index))
        factor, near = reduce_crop(crop, size)
        assert min(near[2:]) >= size
        assert near[0] + near[2] <= -(-height // factor) and near[1] + near[3] <= -(
            -width // factor
        )
        if factor > 1:
            moved = np.array([near[0], near[0] + near[2], near[1], near[1] + near[3]]) * factor
            edges[factor].append(moved - [top, top + rows, left, left + columns])
    for factor, moves in edges.items():
        if len(moves) > 500:
            moves = np.array(moves)  # in pixels of the whole image
            assert np.abs(moves).max() <= factor / 2
            assert np.abs(moves.mean(axis=0)).max() < factor / 16  # rounding down: factor / 2
    assert sum(map(len, edges.values())) > 2000


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_pixels_are_neither_moved_nor_brightened(scale, subsampling):
    """Least squares tell the shift between waves to a hundredth of an output pixel."""
    size = 112
    side = scale * (size + 5)  # no multiple of 8 x scale, so that the last blocks are not whole
    data = encoded(waves(side, side, 20 * scale), quality=95, subsampling=subsampling)
    exact, small = load_square(data, size).double()[0], load_square(data, size, scaled=True)[0]
    error = small.double() - exact
    assert 0 < error.abs().mean() < 2 and abs(error.mean()) < 0.2
    for axis in (0, 1):
        slope = torch.gradient(exact, dim=axis)[0]
        assert abs((error * slope).sum() / slope.square().sum()) < 0.01


def test_draws_are_those_of_the_exact_path():
    data = encoded(make_image(7, 400, 300), quality=92)
    for index in range(40):
        exact, scaled = KeyedRandom(6, index), KeyedRandom(6, index)
        a, b = load_square(data, 56, exact), load_square(data, 56, scaled, scaled=True)
        assert exact.uniform() == scaled.uniform()  # as many were drawn
        assert a.shape == b.shape == (3, 56, 56) and b.permute(1, 2, 0).is_contiguous()
        assert not torch.equal(a, b)
        assert difference(a, b) < 0.5 * difference(a, b.flip(-1))


@pytest.mark.parametrize(
    "data, size",
    [
        (encoded(IMAGE, quality=90), 90),  # of 163 x 125: no half of it covers a crop
        (encoded(make_image(4, 400, 300), "PNG"), 28),
        (encoded(make_image(4, 400, 300), "WEBP"), 28),
        (encoded(make_image(4, 400, 300).convert("CMYK"), quality=90, subsampling=2), 28),
    ],
    ids=["small", "PNG", "WEBP", "JPEG of Pillow"],
)
def test_other_images_are_read_exactly(data, size):
    for index in range(10):
        exact = load_square(data, size, KeyedRandom(8, index))
        assert torch.equal(load_square(data, size, KeyedRandom(8, index), scaled=True), exact)
    assert torch.equal(load_square(data, size, scaled=True), load_square(data, size))


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A file with wrong bytes, cut, or with bytes lost or added."""
    place = chance.randrange(2, len(data))
    scan = data.rindex(b"\xff\xda") + 12
    change = chance.randrange(5)
    if change == 0:
        return data[:place]
    if change == 1:
        return data[:place] + data[place + chance.choice((1, 2, 50)) :]
    if change == 2:
        return data[:place] + chance.randbytes(chance.choice((1, 2, 50))) + data[place:]
    wrong = bytearray(data)
    for _ in range(chance.choice((1, 1, 20))):
        wrong[chance.randrange(scan if change == 3 else 2, len(data))] ^= 1 << chance.randrange(8)
    return bytes(wrong)


def refusal(read, *arguments, **options) -> str | None:
    try:
        read(*arguments, **options)
    except BadSampleError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", JPEGS)
def test_the_same_files_are_refused_at_every_scale(name):
    chance = random.Random(name)
    refused = 0
    for index in range(120):
        data = damaged(JPEGS[name], chance)
        expected = refusal(decode, data)
        refused += expected is not None
        assert refusal(check, data) == expected
        for size in (14, 28, 56):  # at 1/8 or 1/4, 1/2, and whole or 1/2
            assert refusal(load_square, data, size, KeyedRandom(index), scaled=True) == expected
    assert 20 < refused < 115


def test_limits_hold_at_every_scale(monkeypatch):
    data = encoded(make_image(5, 400, 300), quality=90)
    monkeypatch.setattr("megatron_owl2.data.pillow_images.MAX_PIXELS", 400 * 300 - 1)
    for read in (decode, check, lambda data: load_square(data, 28, scaled=True)):
        with pytest.raises(BadSampleError, match="400 x 300 pixels exceeds"):
            read(data)


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    plain = encoded(make_image(4, 400, 200))
    turned = encoded(make_image(4, 400, 200), exif=exif)
    assert len(turned) > len(plain)
    assert torch.equal(load_square(turned, 28, scaled=True), load_square(plain, 28, scaled=True))


def test_the_order_and_the_bad_samples_of_a_run_are_those_of_the_exact_path(tmp_path):
    large = [make_image(index, 320, 240) for index in range(12)]
    records = (
        Record(f"k{i}", (encoded(image)[: -400 if i % 4 == 0 else None],), caption=str(i))
        for i, image in enumerate(large)
    )
    folder = write(tmp_path / "set", records)

    def run(name: str, scaled: bool, **options):
        log = tmp_path / f"{name}.jsonl"
        data = config(folder, scaled_decoding=scaled)
        batches = list(loader(data, limit_samples=24, micro=2, bad_sample_log=log, **options))
        return batches, log.read_text()

    (exact, bad), (scaled, scaled_bad) = run("exact", False), run("scaled", True)
    (unseen, unseen_bad) = run("unseen", True, decode_images=False)
    assert bad == scaled_bad == unseen_bad and bad.count("\n") == 6
    for one, other, third in zip(exact, scaled, unseen, strict=True):
        assert one.keys == other.keys == third.keys
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.labels, third.labels)
        assert not torch.equal(one.image, other.image) and third.image.numel() == 0
        assert difference(one.image, other.image) < 10
    assert rows_of(scaled) == rows_of(run("again", True)[0])
