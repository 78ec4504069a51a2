"""The image processor of an export, imported as transformers does: out of its directory."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_owl2.convert.remote_files import write_remote_code


@contextmanager
def exported_module(folder: Path) -> Iterator[ModuleType]:
    """The module of the image processor, its directory being made in `folder`."""
    package = folder / "exported_images_code"
    package.mkdir()
    write_remote_code(package, "owl2")
    (package / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module(f"{package.name}.image_processing_mplug_owl2")
        for name in [name for name in sys.modules if name.startswith(package.name)]:
            del sys.modules[name]


def pixels_of(module: ModuleType, height: int, width: int) -> Callable[..., torch.Tensor]:
    """A function from an image to the uint8 [3, height, width] that its processor shows a model."""
    crop_size = {"height": height, "width": width}
    processor = module.MPLUGOwl2ImageProcessor(crop_size, [0.0] * 3, [1.0] * 3)

    def pixels(image) -> torch.Tensor:
        return (processor(image)["pixel_values"][0] * 255).round().to(torch.uint8)

    return pixels
