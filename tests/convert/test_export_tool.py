"""Export to Hugging Face: from the command line to transformers, as the README says."""

import numpy as np
import pytest
import torch
from exported import offline
from hf_dirs import OWL2, run_tool, small_tokenizer
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline

from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import load_model

PROMPT = "USER: <|image|>What is this? ASSISTANT:"
BEYOND = list(range(320, 512))  # ids that the tiny model has and its tokenizer has not


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(5).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_answers_in_transformers_as_here(tmp_path, capsys, image, dtype):
    ckpt, out = tmp_path / "ckpt", tmp_path / "model"
    tokenizer = small_tokenizer(tmp_path)
    arguments = ("--owl2", OWL2, "--tokenizer", tokenizer, "--output", ckpt)
    assert run_tool("convert_from_hf", *arguments, capsys=capsys)[0] == 0
    arguments = ("--checkpoint", ckpt, "--output", out, "--dtype", dtype)
    assert run_tool("convert_to_hf", *arguments, capsys=capsys)[0] == 0

    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    inputs = processor(text=[PROMPT], images=[image], return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=8, suppress_tokens=BEYOND)
    new = answer[0, inputs["input_ids"].shape[1] :]
    generator = Generator(load_model(out, {"float32": "fp32", "bfloat16": "bf16"}[dtype]))
    ids = [[1, *generator.tokenizer.encode("USER: "), -200]]
    ids[0] += generator.tokenizer.encode("What is this? ASSISTANT:")
    wanted = generator.generate_ids(ids, [[inputs["pixel_values"][0]]], 8)[0]
    if dtype == "float32":
        assert new.tolist()[: len(wanted)] == wanted
    assert 0 < len(new) <= 8


def test_an_export_serves_a_pipeline(tmp_path, capsys, image):
    ckpt, out = tmp_path / "ckpt", tmp_path / "model"
    tokenizer = small_tokenizer(tmp_path)
    arguments = ("--owl2", OWL2, "--tokenizer", tokenizer, "--output", ckpt)
    assert run_tool("convert_from_hf", *arguments, capsys=capsys)[0] == 0
    arguments = ("--checkpoint", ckpt, "--output", out)
    assert run_tool("convert_to_hf", *arguments, capsys=capsys)[0] == 0
    answering = pipeline("image-text-to-text", model=str(out), trust_remote_code=True)
    options = {"max_new_tokens": 3, "suppress_tokens": BEYOND}
    found = answering(text=PROMPT, images=[image], generate_kwargs=options)
    assert isinstance(found[0]["generated_text"], str)
    seen = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    chat = [{"role": "user", "content": seen}]
    (found,) = answering(text=chat, generate_kwargs=options)
    assert [turn["role"] for turn in found["generated_text"]] == ["user", "assistant"]
    found = answering(text=[chat, chat], generate_kwargs=options, batch_size=2)
    assert len(found) == 2
