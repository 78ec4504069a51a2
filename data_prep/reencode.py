"""Re-encoding of images before they are stored: smaller, or as JPEG."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg

from megatron_owl2.data.shards.records import image_extension
from megatron_owl2.errors import BadSampleError

if TYPE_CHECKING:  # the parser of preprocess-data needs DEFAULT_QUALITY alone
    import torch

DEFAULT_QUALITY = 90  # of what must be encoded when no quality was asked for
_LONGEST = 65_500  # pixels; libjpeg's limit


@dataclass(frozen=True)
class Reencoding:
    """Rules of re-encoding.

    Images with a side above `max_side` pixels become smaller and JPEG; with `jpeg_quality` (1 to
    100) every image becomes JPEG; with either, kinds that shards do not hold become JPEG, too.
    """

    max_side: int | None = None
    jpeg_quality: int | None = None

    def accepts(self, image: bytes) -> bool:
        """Whether an image can be stored, judged by its kind alone."""
        return self.max_side is not None or self.jpeg_quality is not None or _storable(image)

    def needed(self, image: bytes, size: tuple[int, int]) -> bool:
        """Whether an image of (width, height) pixels is stored in another form than it was read.

        Raises BadSampleError if it is too long for JPEG.
        """
        small = max(size) <= (self.max_side or math.inf)
        if self.jpeg_quality is None and small and _storable(image):
            return False
        if max(self._target(*size)) > _LONGEST:
            raise BadSampleError("image is too long for JPEG (--max-side makes it smaller)")
        return True

    def encode(self, pixels: "torch.Tensor") -> bytes:
        """JPEG (4:2:0) of uint8 [3, H, W], made smaller by antialiased bicubic interpolation."""
        import torch.nn.functional as F

        height, width = self._target(*pixels.shape[1:])
        if (height, width) != pixels.shape[1:]:
            pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
        rows = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        quality = self.jpeg_quality or DEFAULT_QUALITY
        return simplejpeg.encode_jpeg(rows, quality, "RGB", colorsubsampling="420")

    def _target(self, *size: int) -> tuple[int, ...]:
        """Both sides after scaling, in the order of the arguments."""
        scale = min(1.0, (self.max_side or max(size)) / max(size))
        return tuple(max(1, round(side * scale)) for side in size)


def fit(pixels: "torch.Tensor", longest: int) -> bytes:
    """JPEG of uint8 [3, H, W] with no side above `longest` pixels."""
    return Reencoding(max_side=longest).encode(pixels)


def _storable(image: bytes) -> bool:
    try:
        image_extension(image)
    except BadSampleError:
        return False
    return True
