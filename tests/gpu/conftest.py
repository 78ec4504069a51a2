"""Tests that need a CUDA device: `CUDA_VISIBLE_DEVICES=0 pytest tests/gpu`, in an environment with
the torch of that machine. Elsewhere they are skipped."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="needs a CUDA device; torch sees none here")
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(reason)


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    from megatron_owl2.mcore import setup

    setup.shutdown()
