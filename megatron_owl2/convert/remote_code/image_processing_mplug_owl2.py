"""Images to the pixel values of mPLUG-Owl2."""

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor


class MPLUGOwl2ImageProcessor(BaseImageProcessor):
    """Squashes every image to the model's square, as official inference does, and normalises it.

    `crop_size` {"height", "width"} in pixels is the square; `image_mean` and `image_std` are per
    colour, for values from 0 to 1. Further settings are those of CLIP's processor, which the
    released code reads; they are kept and not used.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, crop_size: dict, image_mean: list, image_std: list, **kwargs):
        super().__init__(**kwargs)
        self.crop_size, self.image_mean, self.image_std = crop_size, image_mean, image_std

    def preprocess(self, images, return_tensors="pt") -> BatchFeature:
        """`pixel_values` fp32 [n, 3, H, W] of one or several images.

        An image is a PIL image, a uint8 array or tensor [H, W, 3] or [3, H, W], a path or a URL.
        Raises ValueError for arrays of another shape or kind.
        """
        images = self.fetch_images(images)
        images = images if isinstance(images, (list, tuple)) else [images]
        size = (self.crop_size["height"], self.crop_size["width"])
        squares = torch.stack([_squash(_pixels(image), size) for image in images])
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (self.image_mean, self.image_std))
        values = (squares.float() / 255 - mean) / std
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)


def _pixels(image) -> torch.Tensor:
    """An image as uint8 [3, H, W]."""
    if isinstance(image, Image.Image):
        image = _to_rgb(image)
    pixels = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))
    if pixels.dim() == 3 and pixels.shape[0] != 3:
        pixels = pixels.permute(2, 0, 1)
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[0] != 3:
        raise ValueError(
            f"an image is {pixels.dtype} {list(pixels.shape)}; give a PIL image or uint8 [H, W, 3]"
        )
    return pixels


def _squash(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if pixels.shape[1:] == size:
        return pixels
    return interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB as in training: 16-bit grey keeps its upper bits, transparency is laid over white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
