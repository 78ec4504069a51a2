"""Staging memory of asynchronous saves: copies of tensors in main memory that is used again.

torch's own pinned memory is handed out in powers of two and stays pinned for good, up to twice of
what a checkpoint needs. Here it is one buffer of the size of what the rank writes, which is the
same from save to save, pinned once.
"""

import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from megatron_owl2.mcore import setup

_ALIGNMENT = 64  # bytes, of a line of the processor's cache


class Staging:
    """Main memory of one rank, pinned where there is a GPU, that outlives the saves.

    One save at a time: the copies of a save are overwritten by those of the next.
    """

    def __init__(self):
        self._memory: _PinnedMemory | None = None

    @property
    def nbytes(self) -> int:
        """The bytes that are held."""
        return 0 if self._memory is None else len(self._memory.data)

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies in main memory, each of a storage of its own, so that it can be saved alone."""
        needed = sum(_aligned(tensor.nbytes) for tensor in tensors)
        if needed > self.nbytes:
            self._memory = None  # let go before there is more
            self._memory = _PinnedMemory(needed)
        copies, offset = [], 0
        for tensor in tensors:
            copies.append(self._place(tensor, offset))
            copies[-1].copy_(tensor, non_blocking=True)
            offset += _aligned(tensor.nbytes)
        torch.cuda.synchronize()
        return copies

    def _place(self, tensor: torch.Tensor, offset: int) -> torch.Tensor:
        if self._memory is None or not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        place = torch.frombuffer(
            self._memory.data, dtype=tensor.dtype, count=tensor.numel(), offset=offset
        )
        return place.view(tensor.shape)


class _PinnedMemory:
    """Zeroed pages of their own, `data`, registered with CUDA until nobody holds this object."""

    def __init__(self, size: int):
        self.data = mmap.mmap(-1, size)  # shared, so that forks of the process copy nothing
        if setup.on_cpu():
            return
        start = torch.frombuffer(self.data, dtype=torch.uint8).data_ptr()
        runtime: Any = torch.cuda.cudart()  # annotated as None, which it never is
        torch.cuda.check_error(runtime.cudaHostRegister(start, size, 0))
        weakref.finalize(self, runtime.cudaHostUnregister, start).atexit = False


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
