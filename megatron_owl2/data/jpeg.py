"""Strict decoding of JPEG with libjpeg-turbo: the pixels that Pillow gives in half the time, and
none from a scan that is damaged or short, which Pillow fills with noise or grey."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import Image

from megatron_owl2.data import pillow_images
from megatron_owl2.data.image_files import MAX_SCANS, has_many_scans, without_metadata
from megatron_owl2.data.pillow_images import UnusableImageError, check_size

_DAMAGE = "its JPEG data are damaged or cut short"
T = TypeVar("T")


def decode(data: bytes, factor: int = 1) -> np.ndarray:
    """A JPEG as RGB, uint8 [H, W, 3], or [ceil(H / factor), ceil(W / factor), 3] for 2, 4 or 8.

    A file without its end marker is short. Raises UnusableImageError, also above MAX_SCANS, for
    the same files with every factor: all of the scans is read. What TurboJPEG refuses for its
    subsampling is left to Pillow, whose only damage is a short file, and keeps its size.
    """
    try:
        return _strictly(data, partial(_decode, factor=factor))
    except UnusableImageError:
        raise
    except _UnknownSubsampling:
        return pillow_images.decode(data)
    except ValueError:
        raise UnusableImageError(f"image cannot be decoded: {_DAMAGE}") from None


def size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header of a JPEG; raises UnusableImageError."""
    try:
        height, width = map(int, _strictly(data, _header)[:2])
    except _UnknownSubsampling:
        return pillow_images.size(data)
    except ValueError:
        raise UnusableImageError(f"image header cannot be read: {_DAMAGE}") from None
    return width, height


class _UnknownSubsampling(ValueError):
    """A JPEG whose subsampling has no name in TurboJPEG."""


def _strictly(data: bytes, read: Callable[[bytes], T]) -> T:
    """What `read` finds if libjpeg has no remark on what the pixels depend on.

    It remarks on metadata as on scans. The rare file with a remark is read again without them.
    """
    try:
        return read(data)
    except UnusableImageError:
        raise
    except ValueError:
        return read(without_metadata(data))


def _header(data: bytes) -> tuple:
    try:
        return simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise _UnknownSubsampling if "subsampling" in str(error) else error from None


def _decode(data: bytes, factor: int) -> np.ndarray:
    height, width, colours, _ = _header(data)
    check_size(int(width), int(height))
    if has_many_scans(data):
        raise UnusableImageError(f"JPEG of more than {MAX_SCANS} scans")
    # libjpeg-turbo takes the smallest of its scales, n / 8, at which no side is shorter than this.
    sides = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
    if colours not in ("CMYK", "YCCK"):
        return simplejpeg.decode_jpeg(data, "RGB", strict=True, **sides)
    inks = 255 - simplejpeg.decode_jpeg(data, "CMYK", strict=True, **sides)
    size = inks.shape[1], inks.shape[0]
    return np.array(Image.frombytes("CMYK", size, inks.tobytes()).convert("RGB"))
