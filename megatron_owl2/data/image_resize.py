"""Resizing of images to the model's square: stretched, padded or cropped.

Needs torch alone, since exported directories carry this file: what they show a model is what
training shows it.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class SquareResize:
    """uint8 [3, H, W] to [3, size, size] in one of three modes, all antialiased bicubic.

    `stretch` does not keep the shape of the image: the official evaluation does so, and says it is
    best. `pad` first makes the image a square, in the middle, by bands of the colour `mean` (per
    channel, of values from 0 to 1), as the official training does. `crop` resizes the shorter side
    to `size` and takes the middle of the longer one, as CLIP's processor does. Raises ValueError
    for another mode.
    """

    mode: str = "stretch"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)

    def __post_init__(self):
        if self.mode not in ("stretch", "pad", "crop"):
            raise ValueError(f"image_mode is {self.mode!r}; use stretch, pad or crop")

    def __call__(self, image: torch.Tensor, size: int) -> torch.Tensor:
        if self.mode == "stretch":
            return resize(image, size, size)
        # The longer side shrinks first, in a pass of its own, so that no image, however long, takes
        # more memory than its longer side times `size`.
        if image.shape[1] > image.shape[2]:
            return self(image.mT, size).mT
        return (self._pad if self.mode == "pad" else _crop)(image, size)

    def _pad(self, image: torch.Tensor, size: int) -> torch.Tensor:
        height, side = image.shape[1:]
        colour = [min(max(int(mean * 255), 0), 255) for mean in self.mean]
        padded = image.new_tensor(colour)[:, None, None].repeat(1, side, size)
        top = (side - height) // 2
        padded[:, top : top + height] = resize(image, height, size)
        return resize(padded, size, size)


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [3, H, W] to [3, height, width] with antialiased bicubic interpolation.

    The result lies in memory as pixels come from a decoder, channels last: turning it over costs
    as much as half of the interpolation, on a device almost nothing.
    """
    # A crop is copied first, or torch interpolates plane by plane: the same values at a third more.
    batch = image[None].contiguous(memory_format=torch.channels_last)
    if image.shape[1:] == (height, width):
        return batch[0]
    return interpolate(batch, (height, width), mode="bicubic", antialias=True)[0]


def _crop(image: torch.Tensor, size: int) -> torch.Tensor:
    height, width = image.shape[1:]
    longer = int(size * width / height)
    left = (longer - size) // 2
    strip = resize(image, height, longer)[:, :, left : left + size]
    return resize(strip, size, size)
