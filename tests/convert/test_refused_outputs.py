"""Conversions that cannot finish: nothing half done, no traceback, no other's files."""

import shutil
import signal
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hf_dirs import OWL2, TOOLS, export
from processes import run_ranks

from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.safetensors_io import TensorReader
from megatron_owl2.convert.sources import from_checkpoint, from_released
from megatron_owl2.errors import CheckpointError, ConversionError

pytestmark = pytest.mark.slow


def test_a_failed_export_leaves_nothing(tmp_path):
    model = from_released(OWL2).build()
    with torch.no_grad():
        model.final_norm.weight[3] = 1e6
    with pytest.raises(ConversionError, match="model.norm.weight .* too large for torch.float16"):
        export(model, tmp_path / "out", dtype=torch.float16)
    with torch.no_grad():
        model.final_norm.weight[3] = float("nan")
    with pytest.raises(ConversionError, match="model.norm.weight .* not finite"):
        export(model, tmp_path / "out")
    with pytest.raises(ConversionError, match="/dev/null/out cannot be written"):
        export(model, "/dev/null/out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def after(tmp_path_factory):
    """Runs a tool, with its arguments, after some code in the same process."""

    def run(code: str, tool: str, *arguments: object) -> subprocess.CompletedProcess:
        program = tmp_path_factory.mktemp("program") / "program.py"
        program.write_text(
            f"{code}\nimport runpy, sys\n"
            f"sys.argv[0] = {str(TOOLS / tool)!r} + '.py'\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        return run_ranks(1, program, *arguments)

    return run


def test_a_full_disk_leaves_nothing(tmp_path, after):
    """A limit on the size of files stands for the disk that fills up while a tensor is written."""
    whole = from_released(OWL2)
    write_checkpoint(tmp_path / "ckpt", whole.tensors, whole.config)
    for tool, source in (
        ("convert_from_hf", ["--owl2", OWL2]),
        ("convert_to_hf", ["--checkpoint", tmp_path / "ckpt"]),
    ):
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
        done = after(limit, tool, *source, "--output", tmp_path / "out")
        assert done.returncode == 2, done.stderr
        assert "out" in done.stderr and "File too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_no_room_is_known_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    whole = from_released(OWL2)
    with pytest.raises(CheckpointError, match="no room .* needs 0.0 GiB"):
        write_checkpoint(tmp_path / "ckpt", whole.tensors, whole.config)
    with pytest.raises(ConversionError, match="no room .* needs 0.0 GiB"):
        export_hf(whole.tensors, whole.config.model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_output_do_not_meet(tmp_path):
    whole = from_released(OWL2)

    def overtaken() -> torch.Tensor:
        if not (tmp_path / "out").exists():
            export_hf(whole.tensors, whole.config.model, tmp_path / "out")
        return whole.tensors["final_norm.weight"].read()

    tensors = whole.tensors | {
        "final_norm.weight": replace(whole.tensors["final_norm.weight"], read=overtaken)
    }
    with pytest.raises(ConversionError, match="out cannot be written"):
        export_hf(tensors, whole.config.model, tmp_path / "out")
    assert TensorReader(tmp_path / "out").names()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    abandoned = tmp_path / ".out.x1.partial"
    abandoned.mkdir()
    whole = from_released(OWL2)
    write_checkpoint(tmp_path / "out", whole.tensors, whole.config)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("tool", ["convert_from_hf", "convert_to_hf"])
def test_an_interrupted_tool_says_so_and_leaves_nothing(tmp_path, converted, after, tool, number):
    source = {"convert_from_hf": ["--owl2", OWL2], "convert_to_hf": ["--checkpoint", converted]}
    code = f"""
import os
from megatron_owl2.convert import lazy_tensor, megatron_io, safetensors_io
read_ahead = lazy_tensor.read_ahead
def stopped(tensors):
    for count, pair in enumerate(read_ahead(tensors)):
        if count == 3:
            os.kill(os.getpid(), {int(number)})
        yield pair
megatron_io.read_ahead = safetensors_io.read_ahead = stopped
"""
    done = after(code, tool, *source[tool], "--output", tmp_path / "out")
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("interrupted; nothing was written\n")
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_an_existing_output_is_refused(converted):
    whole = from_checkpoint(converted)
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(converted, whole.tensors, whole.config)
    with pytest.raises(ConversionError, match="exists already"):
        export_hf(whole.tensors, whole.config.model, converted)
