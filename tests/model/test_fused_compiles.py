"""Every Triton kernel is compiled for an H100, which needs no GPU."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.versions
pytest.importorskip("triton", reason="needs Triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_owl2.mcore.setup import setup

setup()
from megatron_owl2.model.kernels.fused import (
    cross_entropy_kernels, norm_kernels, qkv_kernels, quick_gelu_kernels, swiglu_kernels,
)

TYPES = {"is_vision": "*i1", "partial": "*fp32", "eps": "fp32", "labels": "*i64", "rows": "i32",
         "found": "*fp32", "log_sum": "*fp32", "size": "i32", "first": "i32"}
NUMBERS = ("batch", "groups", "queries", "half")
QKV = {name: "i32" for name in NUMBERS} | {
    f"{part}_{step}": "i32" for part in ("query", "key", "value") for step in ("s", "b", "head")
}

def compiled(kernel, types, **constants):
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16")
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(kernel.fn.__module__.split(".")[-1], kernel.fn.__name__, len(made.asm["cubin"]) > 0)

ALONE = {"vision": None, "is_vision": None, "SPLIT": False}
for split in ({"SPLIT": True}, ALONE):
    compiled(norm_kernels._forward, TYPES, BLOCK=4096, **split)
    compiled(norm_kernels._backward, TYPES, BLOCK=4096, WEIGHTS=True, **split)
for kernels in (swiglu_kernels, quick_gelu_kernels):
    compiled(kernels._forward, TYPES, BLOCK=kernels.BLOCK)
    compiled(kernels._backward, TYPES, BLOCK=kernels.BLOCK)
block = cross_entropy_kernels.BLOCK
compiled(cross_entropy_kernels._forward, TYPES, BLOCK=block)
compiled(cross_entropy_kernels._backward, TYPES | {"grad": "*fp32"}, BLOCK=block)
for back in (False, True):
    blocks = {"BACK": back, "GROUPS": 8, "HALF": 64}
    compiled(qkv_kernels._all_tokens, QKV, HEADS=32, **blocks)
    compiled(qkv_kernels._vision_tokens, QKV | {"rows": "*i64"}, **blocks)
"""


def test_every_kernel_compiles_for_an_h100(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 14 and all(line.endswith("True") for line in lines)
