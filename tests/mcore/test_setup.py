"""Set-up of a process for megatron-core."""

import importlib
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest
import torch
from packaging.version import Version
from paths import ROOT

from megatron_owl2.errors import ConfigError
from megatron_owl2.mcore import setup

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
SETUP = """
from megatron_owl2.mcore.setup import setup
setup()
"""

REFUSED_RUN = """
import os, torch
asked, ask = [], torch.cuda.is_available
torch.cuda.is_available = lambda: asked.append(os.environ.get(CONNECTIONS)) or ask()
from megatron_owl2.train import main
options = ["watch.profiler=nsys", "parallel.tensor=1", "parallel.sequence=false"]
assert main(["--config", CONFIG, *options]) == 2
assert asked and set(asked) == {"1"}, asked
"""
AT_THE_END = """
import atexit, torch
from megatron_owl2.config.schema import ParallelConfig
from megatron_owl2.mcore.setup import initialize
atexit.register(lambda: print("left:", not torch.distributed.is_initialized()))
initialize(ParallelConfig())
"""


def run(program: str) -> subprocess.CompletedProcess:
    """Run a program in a process of its own, for it is set up once."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("program", [WITHOUT_WANDB, WITH_WANDB])
def test_wandb_is_not_imported_and_not_hidden(program):
    done = run(program)
    assert done.returncode == 0, done.stderr


def test_a_process_alone_leaves_its_groups_at_its_end():
    done = run(AT_THE_END)
    assert done.returncode == 0 and done.stdout == "left: True\n", done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU does not stand in for a GPU")
def test_inside_a_device_it_is_refused():
    done = run(INSIDE_A_DEVICE)
    assert done.returncode != 0 and "before entering torch.device" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the run would not be refused")
def test_connections_are_set_before_cuda_is_asked(monkeypatch):
    """CUDA reads them once, at its first call, which may be a check of the machine."""
    name, config = "CUDA_DEVICE_MAX_CONNECTIONS", ROOT / "examples" / "tiny" / "pretrain.yaml"
    monkeypatch.delenv(name, raising=False)
    done = run(f"CONNECTIONS, CONFIG = {name!r}, {str(config)!r}\n" + REFUSED_RUN)
    assert done.returncode == 0 and "needs a GPU" in done.stderr, done.stderr


def describe_extension(folder: Path, version: str) -> None:
    """Make it look installed as far as its version goes."""
    description = folder / f"nvidia_resiliency_ext-{version}.dist-info" / "METADATA"
    description.parent.mkdir()
    description.write_text(f"Name: nvidia-resiliency-ext\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("version", "refused"), [("0.4.1", ConfigError), ("0.6.0", AttributeError)]
)
def test_a_package_that_megatron_core_crashes_with_is_named(
    tmp_path, monkeypatch, version, refused
):
    describe_extension(tmp_path, version)
    monkeypatch.syspath_prepend(tmp_path)

    def crashing(name):
        raise AttributeError("module 'nvidia_resiliency_ext' has no attribute '__version__'")

    monkeypatch.setattr(importlib, "import_module", crashing)
    with pytest.raises(refused) as error:
        setup._import_megatron_core()
    assert ("resiliency-ext 0.4.1 is too old" in str(error.value)) == (version == "0.4.1")


@pytest.mark.versions
@pytest.mark.skipif(Version(megatron.core.__version__) < Version("0.18"), reason="not looked for")
def test_megatron_core_does_crash_with_it(tmp_path):
    """One that has the modules and is of no version, as 0.4.1 is."""
    package = tmp_path / "nvidia_resiliency_ext"
    modules = "core", "cached_metadata_filesystem_reader", "filesystem_async", "state_dict_saver"
    folder = package / "checkpointing" / "async_ckpt"
    folder.mkdir(parents=True)
    for name in modules:
        (folder / f"{name}.py").touch()
    describe_extension(tmp_path, "0.4.1")
    done = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + SETUP)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1 and "ConfigError: nvidia-resiliency-ext 0.4.1 is too old" in last
    assert "pip uninstall" in last
