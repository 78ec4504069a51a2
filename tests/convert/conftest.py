"""A checkpoint of the tiny released model, for the tests of conversion."""

import pytest
from hf_dirs import OWL2

from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.sources import from_released


@pytest.fixture
def converted(tmp_path):
    whole = from_released(OWL2)
    write_checkpoint(tmp_path / "ckpt", whole.tensors, whole.config)
    return tmp_path / "ckpt"
