"""Sine-cosine position tables of the visual abstractor, the same on every processor.

The released code computes them in numpy's fp32, whose power, sine and cosine round otherwise from
processor to processor: at full size its tables differ by up to 8e-6 between AVX2 and AVX-512. Here
every step of the same formula is rounded correctly, with mpmath's integer arithmetic.
"""

import functools
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import torch

# The names of the model's tables. Checkpoints made before these were kept lack them.
QUERY_POSITIONS: str = "abstractor.query_positions"
IMAGE_POSITIONS: str = "abstractor.image_positions"
NAMES: tuple[str, ...] = (QUERY_POSITIONS, IMAGE_POSITIONS)


def query_positions(count: int, size: int) -> torch.Tensor:
    """Positions of the learnable queries, fp32 [count, size]; on the meta device of that size."""
    if _sizes_only():
        return torch.empty(count, size)
    return torch.from_numpy(_sincos(count, size).copy())


def image_positions(grid: int, size: int) -> torch.Tensor:
    """Positions of the ViT's tokens, fp32 [1 + grid^2, size]: zeros for the class token, then
    row-major patches whose first half encodes the column and whose second half the row."""
    if _sizes_only():
        return torch.empty(1 + grid**2, size)
    rows, columns = np.indices((grid, grid)).reshape(2, -1)
    axis = _sincos(grid, size // 2)
    patches = np.concatenate([axis[columns], axis[rows]], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, size), np.float32), patches]))


def _sizes_only() -> bool:
    """Whether the model is being built without storage, where a second of arithmetic is wasted."""
    return torch.get_default_device().type == "meta"


@functools.cache
def _sincos(count: int, size: int) -> np.ndarray:
    """[sin(p w_j) | cos(p w_j)] of p < count with w_j = 10000^(-j / (size/2)); fp32 [count, size].

    As in the released code, every step is rounded to fp32: exponent, power, w_j, angle and result.
    """
    exponents = np.arange(size // 2, dtype=np.float32) / np.float32(size / 2)
    powers = _rounded(lambda exponent: mpmath.mpf(10000) ** exponent, exponents)
    angles = np.outer(np.arange(count, dtype=np.float32), np.float32(1) / powers)
    return np.concatenate([_rounded(mpmath.sin, angles), _rounded(mpmath.cos, angles)], axis=1)


def _rounded(function: Callable[[Any], Any], values: np.ndarray) -> np.ndarray:
    """The function of fp32 values, computed by mpmath to 80 bits and rounded to fp32."""
    distinct, places = np.unique(values, return_inverse=True)
    with mpmath.workprec(80):
        results = [float(function(mpmath.mpf(float(value)))) for value in distinct]
    return np.array(results).astype(np.float32)[places].reshape(values.shape)
