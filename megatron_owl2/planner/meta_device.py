"""Torch's meta device for models without storage: shapes, dtypes and sizes, but no data."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.library import _scoped_library

from megatron_owl2.mcore.initialization import SkipInitialization

META = torch.device("meta")


@contextmanager
def build_on_meta_device() -> Iterator[None]:
    """Context in which new modules have no storage and skip the initialisation of their weights."""
    with META, SkipInitialization():
        yield


@contextmanager
def run_on_meta_device() -> Iterator[None]:
    """Context in which passes on the meta device are those of a GPU, and no GPU is touched.

    megatron-core gathers into tensors on the current CUDA device, which is the meta device here,
    whatever GPUs torch sees. Attention is flash attention; torch itself would choose the plain
    formula there, which keeps all scores.
    """
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: META  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _scoped_library("aten", "IMPL") as library:
            library.impl("scaled_dot_product_attention", _flash_attention, "AutogradMeta")
            yield
    finally:
        torch.cuda.current_device = current_device


def _flash_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Flash attention as `scaled_dot_product_attention` calls it on a CPU, where grouped queries
    need no copies of their keys."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        masked = torch.scalar_tensor(float("-inf"), dtype=query.dtype, device=META)
        attn_mask = torch.where(attn_mask, 0.0, masked)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
