"""Images to RGB pixels with Pillow: files of every kind that is read, and images of every mode.

Needs Pillow and numpy alone, since exported directories carry this file: what they show a model is
what training shows it.
"""

import io
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image

from .image_files import (
    MAX_SCANS,
    has_many_scans,
    has_sound_chunks,
    kind,
    why_not_read,
    without_metadata,
)

MAX_PIXELS = 80_000_000  # 240 MB of RGB; a larger image is refused before it is decoded
MAX_SIDE = 65_535  # JPEG's; resizing a longer line of pixels would take gigabytes

T = TypeVar("T")


class UnusableImageError(ValueError):
    """An image that is damaged, of an unknown kind or too large; the message is the reason."""


def decode(data: bytes) -> np.ndarray:
    """An image file as RGB, uint8 [H, W, 3]; the first of several frames or pages.

    Damage of metadata is no damage. Raises UnusableImageError, but noise in a JPEG is shown.
    """
    if has_many_scans(data):
        raise UnusableImageError(f"JPEG of more than {MAX_SCANS} scans")
    pixels = _read(data, _pixels, failure := "image cannot be decoded: ")
    if not has_sound_chunks(data):
        raise UnusableImageError(f"{failure}its PNG data are damaged")
    return pixels


def size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header of an image file; raises UnusableImageError."""
    return _read(data, lambda image: image.size, "image header cannot be read: ")


def from_pillow(image: Image.Image) -> np.ndarray:
    """An image of Pillow as RGB, uint8 [H, W, 3]; raises UnusableImageError."""
    try:
        return _despite_remarks(lambda: _pixels(image))
    except UnusableImageError:
        raise
    except Exception:  # a file that Pillow reads only now, or that is closed by now
        damage = "its data are damaged or cut short, or its file is closed"
        raise UnusableImageError(f"image cannot be decoded: {damage}") from None


def check_size(width: int, height: int) -> None:
    """Raise UnusableImageError for an image without pixels, or too large to decode and resize."""
    if min(width, height) < 1:
        raise UnusableImageError(f"image of {width} x {height} pixels")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise UnusableImageError(
            f"image of {width} x {height} pixels exceeds {MAX_PIXELS} pixels or a side of "
            f"{MAX_SIDE}"
        )


def _read(data: bytes, use: Callable[[Image.Image], T], failure: str) -> T:
    """What `use` finds in an image file, `failure` being the first words of a refusal."""
    name = kind(data)
    if name is None:
        raise UnusableImageError(failure + why_not_read(data))
    try:
        return _despite_remarks(lambda: _with_or_without_metadata(data, name, use))
    except UnusableImageError:
        raise
    except Image.DecompressionBombError:
        raise UnusableImageError(f"image of more than {MAX_PIXELS} pixels") from None
    except SyntaxError:
        damage = f"its {name} header is damaged or of a variant that is not read"
        raise UnusableImageError(failure + damage) from None
    except Exception:  # Pillow's readers raise many types on damaged files
        raise UnusableImageError(f"{failure}its {name} data are damaged or cut short") from None


def _with_or_without_metadata(data: bytes, name: str, use: Callable[[Image.Image], T]) -> T:
    """What `use` finds in the file, or else in a copy without metadata, which may be damaged."""
    try:
        return _opened(data, name, use)
    except (Warning, Image.DecompressionBombError, UnusableImageError):
        raise
    except Exception as error:
        # A text of a PNG that unpacks to more than Pillow allows is no damage, but a bomb.
        if name not in ("JPEG", "PNG") or "MAX_TEXT" in str(error):
            raise
        return _opened(without_metadata(data), name, use)


def _opened(data: bytes, name: str, use: Callable[[Image.Image], T]) -> T:
    try:
        image = Image.open(io.BytesIO(data), formats=[name.upper()])
    except (Warning, Image.DecompressionBombError):
        raise
    except Exception as error:  # one type for all that is wrong with a header
        raise SyntaxError(str(error)) from None
    with image:
        return use(image)


def _despite_remarks(read: Callable[[], T]) -> T:
    """The result of `read` also where warnings are errors: Pillow's are remarks on metadata."""
    try:
        return read()
    except Warning:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()


def _pixels(image: Image.Image) -> np.ndarray:
    check_size(*image.size)
    return np.array(_to_rgb(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    """16-bit grey keeps its upper bits, transparency is laid over white."""
    sixteen_bits = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PNG"  # as older releases of Pillow open it
    )
    if image.mode in ("I", "F") and not sixteen_bits:
        raise UnusableImageError("image of 32-bit numbers, whose white is unknown")
    if sixteen_bits:  # convert() would clip instead of scale
        grey = np.asarray(image)
        white = grey == image.info.get("transparency", -1)
        return Image.fromarray(np.where(white, 255, grey >> 8).astype(np.uint8)).convert("RGB")
    palette = image.palette.mode if image.mode == "P" and image.palette is not None else ""
    if (
        image.mode in ("LA", "PA", "La", "RGBA", "RGBa")
        or "transparency" in image.info
        or palette.endswith("A")
    ):
        # Pillow knows no other way from La.
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
