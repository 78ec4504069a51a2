"""Images to the pixel values of mPLUG-Owl2."""

import base64
import binascii
from os import PathLike, fspath
from os.path import isfile
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

# transformers 5.4 copies what a file imports itself, and not what those files import.
from .image_files import kind  # noqa: F401
from .image_resize import SquareResize, resize
from .pillow_images import check_size, decode, from_pillow


class MPLUGOwl2ImageProcessor(BaseImageProcessor):
    """Resizes every image to the model's square, as the model was trained, and normalises it.

    `crop_size` {"height", "width"} in pixels is the square; `image_mean` and `image_std` are per
    colour, for values from 0 to 1. `image_mode` is that of `SquareResize`: stretch, pad or crop;
    ValueError for another one. Further settings are those of CLIP's processor, which the released
    code reads; they are kept and not used.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        crop_size: dict,
        image_mean: list,
        image_std: list,
        image_mode: str = "stretch",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.crop_size, self.image_mean, self.image_std = crop_size, image_mean, image_std
        self.image_mode = image_mode

    def preprocess(self, images, return_tensors="pt", **keywords) -> BatchFeature:
        """`pixel_values` fp32 [n, 3, H, W] of one or several images, also in lists of lists.

        An image is a PIL image, a uint8 array or tensor [H, W, 3] or [3, H, W], a path, a URL or
        the file in base64. Raises ValueError for arrays of another shape or kind, and for images
        that training refuses, in the same words; TypeError for `keywords`.
        """
        if keywords:
            raise TypeError(
                f"{', '.join(keywords)}: leave it out; images always get the model's own size, "
                "mean and deviation"
            )
        squares = [self._square(_pixels(image)) for image in _flat(images)]
        if not squares:
            raise ValueError("no images; give one or several")
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (self.image_mean, self.image_std))
        values = (torch.stack(squares).float() / 255 - mean) / std
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    def fetch_images(self, images):
        """The same images, with PIL images in place of paths, URLs and base64.

        transformers' own function turns an image by its EXIF orientation and drops its
        transparency; training does neither.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (str, PathLike)):
            return Image.fromarray(_decoded(fspath(images)))
        return images

    def _square(self, pixels: torch.Tensor) -> torch.Tensor:
        height, width = self.crop_size["height"], self.crop_size["width"]
        if self.image_mode == "stretch":
            return resize(pixels, height, width)
        return SquareResize(self.image_mode, tuple(self.image_mean))(pixels, height)


def _flat(images) -> list:
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for entry in images for image in _flat(entry)]


def _pixels(image) -> torch.Tensor:
    """An image as uint8 [3, H, W]."""
    if isinstance(image, (str, PathLike)):
        return torch.from_numpy(_decoded(fspath(image))).permute(2, 0, 1)
    if isinstance(image, Image.Image):
        return torch.from_numpy(from_pillow(image)).permute(2, 0, 1)
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise ValueError(f"an image is of type {type(image).__name__}; give a PIL image or a path")
    colours = [axis for axis in (0, 2) if image.ndim == 3 and image.shape[axis] == 3]
    if str(image.dtype) not in ("uint8", "torch.uint8") or len(colours) != 1:
        which = " (which axis has the colours is not clear)" if len(colours) == 2 else ""
        raise ValueError(
            f"an image is {image.dtype} {list(image.shape)}{which}; give a PIL image or uint8 "
            "[H, W, 3]"
        )
    pixels = image.cpu() if isinstance(image, torch.Tensor) else torch.from_numpy(image.copy())
    pixels = pixels if colours == [0] else pixels.permute(2, 0, 1)
    check_size(pixels.shape[2], pixels.shape[1])
    return pixels


def _decoded(source: str) -> np.ndarray:
    """The file at a path or URL, or given as base64 or a data URI, as uint8 [H, W, 3]."""
    name = source if len(source) <= 200 else f"{source[:40]}..."
    try:
        return decode(_file(source))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except URLError as error:
        raise ValueError(f"{name}: {error.reason}") from None


def _file(source: str) -> bytes:
    if source.startswith(("http://", "https://")):
        request = Request(source, headers={"User-Agent": "mplug-owl2"})
        with urlopen(request, timeout=60) as response:
            return response.read()
    if isfile(source):
        return Path(source).read_bytes()
    try:
        return base64.b64decode(source.split(",")[-1], validate=True)
    except binascii.Error:
        raise ValueError("there is no such file, and it is neither a URL nor base64") from None
