"""Records what the released code's formula gives in numpy's fp32 on this processor.

    NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL" python make.py avx2.npz
    NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL" python make.py x86_v2.npz

made the files beside it, with numpy 2.4 on a processor that has AVX-512.
"""

import sys

import numpy as np


def table(count: int, size: int) -> np.ndarray:
    frequencies = np.arange(size // 2, dtype=np.float32)
    frequencies /= size / 2.0
    frequencies = 1.0 / 10000**frequencies
    angles = np.einsum("m,d->md", np.arange(count, dtype=np.float32), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


if __name__ == "__main__":  # 64 queries; a row of patches at 448 pixels
    np.savez_compressed(sys.argv[1], queries=table(64, 1024), axis=table(32, 512))
