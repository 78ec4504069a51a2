"""Runs of earlier versions go on, export and resume as before."""

import tarfile
from pathlib import Path

import pytest
import tiny_run
import torch
from hf_dirs import run_tool, tensors_of
from paths import DATA

from megatron_owl2.convert.mapping import constants
from megatron_owl2.training.checkpoint import directories

pytestmark = pytest.mark.distributed

ARCHIVE = DATA / "earlier_run/run.tar.xz"


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """The folder that such a run lies in, as the current directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("processes", "parallelism"), [(2, ["parallel.tensor=2"]), (1, [])])
def test_a_run_of_an_earlier_version_goes_on(earlier, processes, parallelism):
    expected = tiny_run.figures(earlier / "run")
    done = tiny_run.train(Path("run.yaml"), Path("run"), *parallelism, processes=processes)
    assert done.returncode == 0, done.stderr
    assert "continuing from run/checkpoints/iter_0000002 at step 2" in done.stdout
    found = tiny_run.figures(earlier / "run")
    assert [step for step, *_ in found] == [1, 2, 3, 4] and found[:2] == expected[:2]
    for now, then in zip(found[2:], expected[2:], strict=True):
        assert now == pytest.approx(then, rel=1e-3)


def test_a_checkpoint_of_an_earlier_version_is_exported(earlier, capsys):
    status, *_ = run_tool("convert_to_hf", "--checkpoint", "run", "--output", "hf", capsys=capsys)
    assert status == 0
    model, exported = directories.read_config("run").model, tensors_of(earlier / "hf")
    for ours, table in constants(model).items():
        theirs = "q_pos_embed" if "query" in ours else "k_pos_embed"
        copies = [tensor for name, tensor in exported.items() if name.endswith(theirs)]
        assert len(copies) == model.abstractor.num_layers
        assert all(torch.equal(copy, table) for copy in copies)
