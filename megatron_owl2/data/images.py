"""Image preprocessing on uint8: decoding, resizing to the model's square, cropping, flipping.

JPEG goes through libjpeg-turbo and the resize through torch's antialiased bicubic filter: within
one or two levels of 255 of Pillow's result in half the time. Normalisation happens on the device.
"""

import io
import math

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from megatron_owl2.data.sampling.keyed_random import KeyedRandom
from megatron_owl2.errors import BadSampleError

MAX_PIXELS = 80_000_000  # 240 MB of RGB; a larger image is refused before it is decoded
MAX_SIDE = 65_535  # JPEG's; resizing a longer line of pixels would take gigabytes
MAX_SCANS = 100  # of a JPEG; every one decodes the whole image again
_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF")


def decode(data: bytes) -> torch.Tensor:
    """An image as RGB, uint8 [3, H, W].

    Grey, palette and CMYK images become RGB, 16-bit ones keep the upper 8 bits, transparency is
    laid over white, an animation gives its first frame. The EXIF orientation is not applied, as
    in the official code. Raises BadSampleError for anything damaged (strictly: Pillow accepts a
    JPEG whose body is noise), of an unknown format, or above MAX_PIXELS, MAX_SIDE or MAX_SCANS.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            height, width = map(int, simplejpeg.decode_jpeg_header(data)[:2])
            check_size(width, height)
            # No other bytes of a JPEG's scans look like the start of one.
            if _may_have_many_scans(data) and data.count(b"\xff\xda") > MAX_SCANS:
                raise BadSampleError(f"JPEG of more than {MAX_SCANS} scans")
            pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
        else:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return from_pillow(image)
    except BadSampleError:
        raise
    except Exception as error:  # Pillow's readers raise many types on damaged files
        raise BadSampleError(f"image cannot be decoded: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def from_pillow(image: Image.Image) -> torch.Tensor:
    """An image of Pillow as RGB, uint8 [3, H, W]; raises BadSampleError if it is too large."""
    check_size(*image.size)
    return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header alone; raises BadSampleError if it cannot be read.

    The orientation that EXIF may ask for is not applied, as in decode.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            height, width = map(int, simplejpeg.decode_jpeg_header(data)[:2])
        else:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
    except Exception as error:  # Pillow's readers raise many types on damaged files
        raise BadSampleError(f"image header cannot be read: {error}") from None
    if width < 1 or height < 1:
        raise BadSampleError(f"image of {width} x {height} pixels")
    return width, height


def resize_square(image: torch.Tensor, size: int) -> torch.Tensor:
    """Squash uint8 [3, H, W] to [3, size, size] with antialiased bicubic interpolation.

    The shape of the image is not kept: the official evaluation squashes, and says it is best.
    The result lies in memory as pixels come from a decoder, channels last: turning it over costs
    as much as half of the interpolation, on a device almost nothing.
    """
    # A crop is copied first, or torch interpolates plane by plane: the same values at a third more.
    batch = image[None].contiguous(memory_format=torch.channels_last)
    if image.shape[1:] == (size, size):
        return batch[0]
    return F.interpolate(batch, (size, size), mode="bicubic", antialias=True)[0]


def augment(image: torch.Tensor, size: int, random: KeyedRandom) -> torch.Tensor:
    """Random resized crop (area 0.5 to 1, ratio 3/4 to 4/3) and horizontal flip with p = 0.5.

    uint8 [3, H, W] to [3, size, size]; the paper's stage-1 augmentation, after BLIP-2.
    """
    top, left, height, width = random_crop(image.shape[1], image.shape[2], random)
    flip = random.uniform() < 0.5
    cropped = resize_square(image[:, top : top + height, left : left + width], size)
    return cropped.flip(-1) if flip else cropped


def random_crop(height: int, width: int, random: KeyedRandom) -> tuple[int, int, int, int]:
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


def check_size(width: int, height: int) -> None:
    """Raise BadSampleError for an image that is too large to decode and resize."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadSampleError(
            f"image of {width} x {height} pixels exceeds {MAX_PIXELS} pixels or a side of "
            f"{MAX_SIDE}"
        )


def _may_have_many_scans(data: bytes) -> bool:
    """Whether a decoder reads on after the first scan of a JPEG: it is progressive, or its colours
    come one by one. To look for scans in all of the data costs more than to read the header."""
    components, position = 0, 2
    try:
        while data[position] == 0xFF:
            marker, start = data[position + 1], position + 4
            if marker == 0xDA:  # SOS
                return data[start] < components
            if marker in (0xC0, 0xC1):  # SOF of a sequential Huffman-coded image
                components = data[start + 5]
            elif 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # another SOF
                return True
            position += 2 + int.from_bytes(data[position + 2 : start])
    except IndexError:
        pass
    return True  # not as most programs write it


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise BadSampleError("image of 32-bit numbers, whose white is unknown")
    if image.mode.startswith("I;16"):  # convert() would clip instead of scale
        grey = np.asarray(image)
        white = grey == image.info.get("transparency", -1)
        return Image.fromarray(np.where(white, 255, grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
