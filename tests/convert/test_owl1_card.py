"""The model card of an export of version 1: what it says runs."""

import importlib.util
import re

import pytest
from exported import offline
from paths import DATA
from PIL import Image

from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.sources import from_released
from megatron_owl2.mcore import setup

IMAGE, VIDEO = (DATA / "official_v1_tiny" / name for name in ("hf_ckpt", "hf_ckpt_video"))


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")
    setup.shutdown()


@pytest.mark.parametrize("directory", [IMAGE, VIDEO])
def test_the_model_card_runs(directory, tmp_path, monkeypatch):
    source = from_released(directory)
    out, model = tmp_path / "out", source.config.model
    export_hf(source.tensors, model, out, tokenizer=IMAGE / "tokenizer.model", layout="owl1")
    text = (out / "README.md").read_text()
    assert "# mPLUG-Owl\n" in text and ("<|video|>" in text) == (directory == VIDEO)
    blocks, names = re.findall(r"(?s)```python\n(.*?)```", text), {}
    Image.new("RGB", (80, 60), (10, 200, 30)).save(out / "owl.jpg")
    monkeypatch.chdir(out)
    exec(blocks[0], names)
    assert names["inputs"]["input_ids"].eq(-1).sum() == model.tokens_per_image
    if importlib.util.find_spec("peft"):
        exec(blocks[1], names)
        trained = [p for p in names["model"].parameters() if p.requires_grad]
        assert len(trained) == 4 * model.decoder.num_layers  # A and B of queries and values
