"""The abstractor's position tables: those of the released code, the same on every processor."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hf_dirs import OWL2, editable, tensors_of
from paths import DATA
from safetensors.torch import save_file

from megatron_owl2.convert.mapping import constants
from megatron_owl2.convert.remote_code.owl2.vision_mplug_owl2 import position_table
from megatron_owl2.convert.sources import from_released
from megatron_owl2.errors import ConversionError
from megatron_owl2.model.layer_stack import weights
from megatron_owl2.model.position_tables import NAMES, image_positions, query_positions

pytestmark = pytest.mark.slow

ENDS = ("q_pos_embed", "k_pos_embed")
RECORDED = DATA / "position_tables"
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


def test_position_tables_are_kept_unless_they_do_not_fit(tmp_path):
    """Those of a directory, whatever processor made them; not rounded ones, nor another grid's."""
    config = from_released(OWL2).config
    made = constants(config.model)
    tensors = {n: t + 1e-6 if n.endswith(ENDS) else t for n, t in tensors_of(OWL2).items()}
    stored = {
        ours: next(t for n, t in tensors.items() if n.endswith(end))
        for ours, end in zip(NAMES, ENDS, strict=True)
    }
    source = editable(OWL2, tmp_path / "in")
    save_file(tensors, source / "model.safetensors")
    whole = from_released(source)
    model = whole.build()
    for name in NAMES:
        assert torch.equal(whole.tensors[name].read(), stored[name])
        assert torch.equal(weights(model)[name], stored[name])

    config.model.vision.image_size *= 2
    larger = from_released(source, config=config).tensors
    grid = config.model.vision.grid_size
    assert larger[NAMES[1]].shape == (1 + grid**2, config.model.vision.hidden_size)
    assert torch.equal(larger[NAMES[1]].read(), constants(config.model)[NAMES[1]])

    rounded = {n: t.bfloat16() if n.endswith(ENDS) else t for n, t in tensors.items()}
    save_file(rounded, source / "model.safetensors")
    for name in NAMES:
        assert torch.equal(from_released(source).tensors[name].read(), made[name])

    name = next(n for n in tensors if n.endswith(ENDS))
    save_file(tensors | {name: tensors[name] + 1}, source / "model.safetensors")
    with pytest.raises(ConversionError, match="which hold one position table"):
        from_released(source)
    save_file({n: t for n, t in tensors.items() if n != name}, source / "model.safetensors")
    with pytest.raises(ConversionError, match=f"missing: {name}"):
        from_released(source)


if __name__ == "__main__":
    print(*hashes())
