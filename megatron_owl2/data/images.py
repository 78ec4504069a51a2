"""Image preprocessing on uint8: decoding, resizing to the model's square, cropping, flipping.

JPEG goes through libjpeg-turbo and the resize (image_resize.py) through torch's antialiased bicubic
filter: within one or two levels of 255 of Pillow's result in half the time. Normalisation happens
on the device.
"""

import math

import torch
from PIL import Image

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.data import jpeg, pillow_images
from megatron_owl2.data.image_files import kind
from megatron_owl2.data.image_resize import SquareResize, resize
from megatron_owl2.data.pillow_images import UnusableImageError
from megatron_owl2.data.sampling.keyed_random import KeyedRandom
from megatron_owl2.errors import BadSampleError

Crop = tuple[int, int, int, int]  # top, left, height, width in pixels
_FACTORS = 8, 4, 2  # by which libjpeg-turbo divides the sides of a JPEG at less cost
STRETCH = SquareResize()


def decode(data: bytes) -> torch.Tensor:
    """An image as RGB, uint8 [3, H, W].

    Grey, palette and CMYK images become RGB, 16-bit ones keep the upper 8 bits, transparency is
    laid over white, an animation gives its first frame. The EXIF orientation is not applied, as
    in the official code. Damage of metadata is no damage. Raises BadSampleError for anything
    else that is damaged (strictly: Pillow accepts a JPEG whose body is noise), of an unknown
    format, of 32-bit numbers, or above MAX_PIXELS, MAX_SIDE or MAX_SCANS.
    """
    return _decode(data, 1)


def check(data: bytes) -> None:
    """Raise BadSampleError for the images for which decode raises it, with the same message.

    That takes decoding, but at the smallest scale a JPEG costs two thirds.
    """
    _decode(data, _FACTORS[0])


def load_square(
    data: bytes,
    size: int,
    random: KeyedRandom | None = None,
    scaled: bool = False,
    to_square: SquareResize = STRETCH,
) -> torch.Tensor:
    """An image file as uint8 [3, size, size]: resized by `to_square`, or augmented where `random`
    is given (the crop is stretched then, whatever the mode).

    `scaled` decodes a JPEG that has more pixels than needed at the smallest scale, of 1/2, 1/4 and
    1/8, at which the crop still has `size` rows and columns; the crop's edges are rounded to whole
    pixels there. The same is drawn from `random` with it and without it, and BadSampleError is
    raised, as by decode, for the same images.
    """
    shape = _jpeg_shape(data) if scaled else None
    if shape is None:
        image = decode(data)
        crop = _draw(image.shape[1], image.shape[2], random)
    else:
        crop = _draw(*shape, random)
        factor, reduced = reduce_crop(crop, size)
        image = _decode(data, factor)
        crop = crop if image.shape[1:] == shape else reduced
    top, left, height, width = crop
    shown = image[:, top : top + height, left : left + width]
    return to_square(shown, size) if random is None else _flip(resize_square(shown, size), random)


def square_resize(model: ModelConfig) -> SquareResize:
    """The resizing of images for a model, in its `image_mode`."""
    return SquareResize(model.image_mode, tuple(model.image_mean))


def from_pillow(image: Image.Image) -> torch.Tensor:
    """An image of Pillow as RGB, uint8 [3, H, W]; raises BadSampleError as decode does."""
    try:
        return torch.from_numpy(pillow_images.from_pillow(image)).permute(2, 0, 1)
    except UnusableImageError as error:
        raise BadSampleError(str(error)) from None


def check_tensor(pixels: torch.Tensor) -> torch.Tensor:
    """The same tensor; raises BadSampleError if it is not uint8 [3, H, W], or too large."""
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[0] != 3:
        raise BadSampleError(f"a tensor {pixels.dtype} {list(pixels.shape)}; give uint8 [3, H, W]")
    try:
        pillow_images.check_size(pixels.shape[2], pixels.shape[1])
    except UnusableImageError as error:
        raise BadSampleError(str(error)) from None
    return pixels


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header alone; raises BadSampleError if it cannot be read.

    The orientation that EXIF may ask for is not applied, as in decode.
    """
    try:
        width, height = (jpeg if kind(data) == "JPEG" else pillow_images).size(data)
    except UnusableImageError as error:
        raise BadSampleError(str(error)) from None
    if width < 1 or height < 1:
        raise BadSampleError(f"image of {width} x {height} pixels")
    return width, height


def resize_square(image: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [3, H, W] stretched to [3, size, size], channels last in memory."""
    return resize(image, size, size)


def augment(image: torch.Tensor, size: int, random: KeyedRandom) -> torch.Tensor:
    """Random resized crop (area 0.5 to 1, ratio 3/4 to 4/3) and horizontal flip with p = 0.5.

    uint8 [3, H, W] to [3, size, size]; the paper's stage-1 augmentation, after BLIP-2.
    """
    top, left, height, width = random_crop(image.shape[1], image.shape[2], random)
    return _flip(resize_square(image[:, top : top + height, left : left + width], size), random)


def random_crop(height: int, width: int, random: KeyedRandom) -> Crop:
    """Top, left, height, width of a random crop."""
    for _ in range(10):
        area = height * width * random.uniform(0.5, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(random.uniform(0, height - crop_height + 1))
            left = int(random.uniform(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    # A very long image: the largest central crop of an allowed ratio.
    crop_width = min(width, max(1, round(height * 4 / 3)))
    crop_height = min(height, max(1, round(width * 4 / 3)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def reduce_crop(crop: Crop, size: int) -> tuple[int, Crop]:
    """The greatest factor, of 1, 2, 4 and 8, by which a crop can be divided and still have `size`
    rows and columns, and the crop divided by it.

    Each edge is rounded by itself, halves to even, so that crops are neither moved nor stretched on
    average.
    """
    top, left, height, width = crop
    for factor in _FACTORS:
        low, high = round(top / factor), round((top + height) / factor)
        near, far = round(left / factor), round((left + width) / factor)
        if min(high - low, far - near) >= size:
            return factor, (low, near, high - low, far - near)
    return 1, crop


def _decode(data: bytes, factor: int) -> torch.Tensor:
    """An image, the sides of a JPEG divided by `factor` and rounded up."""
    try:
        pixels = jpeg.decode(data, factor) if kind(data) == "JPEG" else pillow_images.decode(data)
    except UnusableImageError as error:
        raise BadSampleError(str(error)) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG; None for other files, and damaged ones, of which decode tells."""
    if kind(data) != "JPEG":
        return None
    try:
        width, height = jpeg.size(data)
    except UnusableImageError:
        return None
    return height, width


def _draw(height: int, width: int, random: KeyedRandom | None) -> Crop:
    return (0, 0, height, width) if random is None else random_crop(height, width, random)


def _flip(square: torch.Tensor, random: KeyedRandom) -> torch.Tensor:
    """The image, mirrored with p = 0.5."""
    return square.flip(-1) if random.uniform() < 0.5 else square
