"""The model card of an export: what it says holds, for LoRA with peft as well."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from exported import export, grouped_model, load, offline
from hf_dirs import OWL2, small_tokenizer
from PIL import Image

from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.sources import from_released

LINEARS = ["q_proj", "k_proj.multiway.0", "k_proj.multiway.1"]
LINEARS += ["v_proj.multiway.0", "v_proj.multiway.1", "o_proj"]


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    tokenizer = small_tokenizer(folder)
    directory = export(grouped_model(), folder / "an export, v1.5", tokenizer)
    Image.new("RGB", (60, 40), (200, 20, 20)).save(folder / "owl.jpg")
    return directory


def code_blocks(directory: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.S)


@pytest.fixture
def after_the_first(directory, monkeypatch) -> dict:
    """What the names of the card's first block stand for, once it has run in its folder."""
    monkeypatch.chdir(directory)
    block = code_blocks(directory)[0].replace("owl.jpg", "../owl.jpg")
    names: dict = {}
    exec(block.replace("max_new_tokens=64", "max_new_tokens=3"), names)
    return names


def test_its_settings_are_those_of_the_hub(directory):
    _, settings, text = (directory / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(settings) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mplug-owl2", "custom_code"],
    }
    assert "to 28 x 28 pixels and takes 5 of the 96 positions" in text
    assert "no `tokenizer.model`" not in text and "{" not in code_blocks(directory)[0]


def test_its_example_runs(after_the_first, capsys):
    assert after_the_first["answer"].shape[0] == 1
    assert after_the_first["inputs"]["modality"].sum() == 5


def test_an_export_without_a_tokenizer_says_so(tmp_path):
    whole = from_released(OWL2)
    export_hf(whole.tensors, whole.config.model, tmp_path / "out")
    assert "There is no `tokenizer.model`" in (tmp_path / "out" / "README.md").read_text()
    assert from_released(tmp_path / "out").tensors.keys() == whole.tensors.keys()


def test_the_names_for_lora_are_the_linears_of_attention(directory):
    model = load(directory)
    targets = re.search(r'"(q_proj)", \*keys_and_values, "(o_proj)"', code_blocks(directory)[1])
    assert targets is not None
    assert LINEARS[:1] + LINEARS[-1:] == list(targets.groups())
    matched = {  # as peft matches names that it is given in a list
        name: type(module)
        for name, module in model.named_modules()
        if any(name.endswith(f".{target}") for target in LINEARS)
    }
    assert set(matched.values()) == {torch.nn.Linear} and len(matched) == 6 * 3
    assert all("self_attn" in name for name in matched)


def test_lora_trains_saves_loads_and_merges(after_the_first, directory, tmp_path):
    peft = pytest.importorskip("peft")
    names, inputs = after_the_first, after_the_first["inputs"]
    exec(code_blocks(directory)[1], names)
    model = names["model"]
    adapted = {name.split("self_attn.")[1] for name in model.targeted_module_names}
    assert adapted == set(LINEARS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the first moves B alone, since it starts at zero
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 6 * 3 and all("lora_" in n for n in adapters)
    assert all(p.grad.abs().sum() > 0 for p in adapters.values())  # text and images alike
    with torch.no_grad():
        wanted = model(**inputs).logits
        plain = load(directory)(**inputs).logits
    assert (wanted - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(directory), tmp_path / "adapter")
    merged = again.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    for part in (merged, names["processor"]):
        part.save_pretrained(tmp_path / "merged")
    assert from_released(tmp_path / "merged").config.model == from_released(directory).config.model


def test_a_usual_name_that_is_no_linear_is_refused_with_what_it_is(directory):
    peft = pytest.importorskip("peft")
    usual = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"(?s)Multiway\(.*multiway.0: text, multiway.1: images"):
        peft.get_peft_model(load(directory), usual)


def test_all_linear_is_possible(directory):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(directory), peft.LoraConfig(target_modules="all-linear"))
    linears = [m for m in load(directory).modules() if isinstance(m, torch.nn.Linear)]
    assert len(model.targeted_module_names) == len(linears) - 1  # all but lm_head
