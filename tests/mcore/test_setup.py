"""Set-up of a process for megatron-core."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.slow

WITHOUT_WANDB = """
import sys
from megatron_owl2.mcore.setup import setup
setup()
import megatron_owl2.training.trainer
assert "megatron.core" in sys.modules and "wandb" not in sys.modules
import wandb
assert wandb.__version__
"""
WITH_WANDB = """
import sys, types
sys.modules["wandb"] = there = types.ModuleType("wandb")
from megatron_owl2.mcore.setup import setup
setup()
assert "megatron.core" in sys.modules and sys.modules["wandb"] is there
"""
INSIDE_A_DEVICE = """
import torch
from megatron_owl2.mcore.setup import setup
with torch.device("meta"):
    setup()
"""


def run(program: str) -> subprocess.CompletedProcess:
    """Run a program in a process of its own, for it is set up once."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("program", [WITHOUT_WANDB, WITH_WANDB])
def test_wandb_is_not_imported_and_not_hidden(program):
    done = run(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU does not stand in for a GPU")
def test_inside_a_device_it_is_refused():
    done = run(INSIDE_A_DEVICE)
    assert done.returncode != 0 and "before entering torch.device" in done.stderr
