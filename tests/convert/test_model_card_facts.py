"""Facts of a model card: what the Hub reads, the stages, their data, and scores."""

import json

import pytest
import yaml
from hf_dirs import OWL2, run_tool

from megatron_owl2.config.load import load_config, save_config
from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.model_card import CardFacts
from megatron_owl2.convert.provenance import trained_stages
from megatron_owl2.convert.sources import from_released
from megatron_owl2.errors import ConversionError

SCORES = {
    "task": "pope",
    "variant": None,
    "limit": 100,
    "blind": False,
    "overall": {"accuracy": 81.25, "majority": 50.0, "n": 100, "note": "a | b"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of two stages and of the conversion that the first one started from."""
    folder, whole = tmp_path_factory.mktemp("runs"), from_released(OWL2)
    for name in ("start", "pretrain", "finetune"):
        write_checkpoint(folder / name, whole.tensors, whole.config)
    for name, before, step in (("pretrain", "start", 4250), ("finetune", "pretrain", 12)):
        config = load_config(folder / name / "run.yaml")
        config.stage.name, config.stage.initial_checkpoint = name, str(folder / before)
        config.train.global_batch_size = 8192
        save_config(config, folder / name / "run.yaml")
        source = {"path": f"/home/me/{name}-data/", "weight": 0.75, "samples": 123456}
        progress = {"step": step, "phases": [{"sources": [source]}]}
        (folder / name / "progress.json").write_text(json.dumps(progress))
    return folder


def test_a_card_tells_how_the_model_came_about(runs, tmp_path, capsys):
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    code, _, errors = run_tool(
        *("convert_to_hf", "--checkpoint", runs / "finetune", "--output", tmp_path / "model"),
        *("--license", "llama2", "--base-model", "meta-llama/Llama-2-7b-hf", "openai/clip"),
        *("--dataset", "kakaobrain/coyo-700m", "--scores", tmp_path / "scores.json"),
        capsys=capsys,
    )
    assert code == 0, errors
    _, settings, text = (tmp_path / "model" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(settings) == {
        "license": "llama2",
        "base_model": ["meta-llama/Llama-2-7b-hf", "openai/clip"],
        "datasets": ["kakaobrain/coyo-700m"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mplug-owl2", "custom_code"],
    }
    assert "| setting | 1. pretrain | 2. finetune |" in text
    assert "| steps | 4,250 | 12 |" in text and "| global batch size | 8,192 | 8,192 |" in text
    assert "| 1. pretrain | pretrain-data | 123,456 | 75.00% |" in text
    assert "| pope | accuracy 81.25 | 100 | the first 100 questions |" in text
    assert "the license `llama2`" in text and "/home/me" not in text


def test_stages_that_are_gone_are_left_out(runs, tmp_path):
    assert [stage.config.stage.name for stage in trained_stages(runs / "finetune")] == [
        "pretrain",
        "finetune",
    ]
    assert trained_stages(runs / "start") == []
    config = load_config(runs / "finetune" / "run.yaml")
    for before in (tmp_path / "gone", runs / "finetune"):  # moved, or started from itself
        config.stage.initial_checkpoint = str(before)
        save_config(config, runs / "finetune" / "run.yaml")
        assert [s.step for s in trained_stages(runs / "finetune")] == [12]


def test_mistakes_are_named(runs, tmp_path, capsys):
    with pytest.raises(ConversionError, match="--dataset 'my data' is no identifier of the Hub"):
        CardFacts(datasets=["my data"])
    (tmp_path / "scores.json").write_text("{}")
    command = ("convert_to_hf", "--checkpoint", runs / "start", "--output", tmp_path / "out")
    code, _, errors = run_tool(*command, "--scores", tmp_path / "scores.json", capsys=capsys)
    assert code == 2 and "scores.json that owl2 evaluate wrote" in errors
    code, _, errors = run_tool(*command, "--layout", "llama", "--license", "mit", capsys=capsys)
    assert code == 2 and "only a whole model has a model card" in errors
    assert not (tmp_path / "out").exists()
