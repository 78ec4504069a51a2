"""Plugin of vLLM without vLLM: prompts to ids, and names of weights."""

from collections import defaultdict

import pytest
from exported import export, grouped_model
from hf_dirs import small_tokenizer

from megatron_owl2.convert.safetensors_io import TensorReader
from megatron_owl2.data.conversation import prompt_ids
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.vllm_plugin.tokenizer import Owl2Tokenizer
from megatron_owl2.vllm_plugin.weights import WEIGHT_NAMES

VOCABULARY = 320


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    return export(grouped_model(), folder / "hf", small_tokenizer(folder))


@pytest.fixture(scope="module")
def tokenizer(directory) -> Owl2Tokenizer:
    return Owl2Tokenizer.from_pretrained(directory, truncation_side="left", revision=None)


@pytest.mark.parametrize("text", ["badal</s>", "<|image|>badal<|image|> <s>x", "a<|image|>", " "])
def test_a_prompt_has_the_ids_of_the_engine(tokenizer, directory, text):
    ids = prompt_ids(text, Tokenizer(directory / "tokenizer.model"))
    wanted = [VOCABULARY if token == IMAGE_TOKEN_ID else token for token in ids]
    assert tokenizer(text)["input_ids"] == tokenizer.encode(text, truncation=False) == wanted
    assert tokenizer.encode(text, add_special_tokens=False) == [t for t in wanted if t != 1]
    assert tokenizer.encode(text, truncation=True, max_length=2) == wanted[-2:]
    assert tokenizer([text, "x"])["input_ids"] == [wanted, tokenizer("x")["input_ids"]]


def test_ids_behind_the_pieces_have_no_text(tokenizer):
    assert tokenizer.max_token_id == VOCABULARY - 1 == tokenizer.placeholder - 1
    assert tokenizer.decode([5, VOCABULARY, VOCABULARY + 9]) == tokenizer.decode([5])
    assert tokenizer.max_chars_per_token >= len("<0x0A>")


def renamed(name: str) -> tuple[str, str | int | None] | None:
    """A name and the part of a weight, as vLLM's WeightsMapper applies the table."""
    part = None
    for old, new in WEIGHT_NAMES["orig_to_new_substr"].items():
        if old in name:
            if new is None:
                return None
            name = name.replace(old, new, 1)
    for old, (new, which) in WEIGHT_NAMES["orig_to_new_stacked"].items():
        if old in name:
            name, part = name.replace(old, new, 1), which
    for old, new in WEIGHT_NAMES["orig_to_new_prefix"].items():
        if name.startswith(old):
            name = name.replace(old, new, 1)
    return name, part


def test_every_weight_of_an_export_has_one_place(directory):
    names = TensorReader(directory).names()
    places = [place for name in names if (place := renamed(name)) is not None]
    assert len(set(places)) == len(places)
    assert {n for n in names if renamed(n) is None} == {n for n in names if "_pos_embed" in n}
    parts = defaultdict(set)
    for name, part in places:
        parts[name].add(part)
    layer = {
        name.split(".2.")[1]: kinds for name, kinds in parts.items() if "model.layers.2" in name
    }
    assert layer == {
        "input_layernorm.weight": {None},
        "input_layernorm.vision": {None},
        "self_attn.qkv_proj.weight": {"q", "k", "v"},
        "self_attn.kv_vision.weight": {"k", "v"},
        "self_attn.o_proj.weight": {None},
        "post_attention_layernorm.weight": {None},
        "post_attention_layernorm.vision": {None},
        "mlp.gate_up_proj.weight": {0, 1},
        "mlp.down_proj.weight": {None},
    }
    outside = {name.split(".")[0] for name in parts if not name.startswith("model.")}
    assert outside == {"lm_head", "vision_model", "visual_abstractor"}
    inside = {name for name in parts if name.startswith("model.") and ".layers." not in name}
    assert inside == {"model.embed_tokens.weight", "model.norm.weight"}
