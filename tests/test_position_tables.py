"""The abstractor's position tables: those of the released code, the same on every processor."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_owl2.convert.remote_code.vision_mplug_owl2 import position_table
from megatron_owl2.model.position_tables import image_positions, query_positions

RECORDED = Path(__file__).parent / "data/position_tables"
HASHES = [
    "92d163cfbf4ccacb7da6aa32cfe1b5bf3287bff305e05151b53345bdf311d31e",
    "d6a48ebc8f391a9718325e724be062aa32f198dd342a896caab8a7573d6b01a4",
]


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest distance in units of the last place."""
    return np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32).astype(np.int64)).max()


def hashes() -> list[str]:
    """SHA-256 of the tables of the paper's model at 448 pixels."""
    tables = query_positions(64, 1024), image_positions(32, 1024)
    return [hashlib.sha256(table.numpy().tobytes()).hexdigest() for table in tables]


@pytest.mark.parametrize("processor", ["avx2", "x86_v2"])
def test_tables_are_the_released_codes_to_one_unit_in_the_last_place(processor):
    recorded = np.load(RECORDED / f"{processor}.npz")
    assert apart(query_positions(64, 1024).numpy(), recorded["queries"]) <= 1
    table = image_positions(32, 1024).numpy()
    assert not table[0].any()
    patches = table[1:].reshape(32, 32, 1024)
    for index in range(32):
        assert apart(patches[index, :, :512].copy(), recorded["axis"]) <= 1  # columns
        assert apart(patches[:, index, 512:].copy(), recorded["axis"]) <= 1  # rows


def test_tables_are_the_same_on_every_processor():
    assert hashes() == HASHES
    older = {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env=os.environ | older,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == HASHES, done.stderr


def test_the_exported_code_computes_the_same_tables():
    ours = torch.cat([query_positions(64, 1024), image_positions(32, 1024)])
    torch.testing.assert_close(position_table(64, 32, 1024), ours, atol=6e-8, rtol=0)


if __name__ == "__main__":
    print(*hashes())
