"""Small Hugging Face directories for the conversion tests, and what is done with them."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from paths import DATA, TOOLS

from megatron_owl2.config.schema import AbstractorConfig, RunConfig
from megatron_owl2.convert import hf_config
from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.lazy_tensor import of_model
from megatron_owl2.convert.safetensors_io import TensorReader
from megatron_owl2.data.tokenizer import train_tokenizer
from megatron_owl2.model.owl2 import Owl2

OWL2 = DATA / "official_tiny" / "hf_ckpt"
LLAMA, CLIP = DATA / "hf_tiny" / "llama", DATA / "hf_tiny" / "clip"
ABSTRACTOR = AbstractorConfig(num_queries=3, num_layers=1, num_heads=2, ffn_size=16)


def small_tokenizer(directory: Path) -> Path:
    """A SentencePiece model of 320 pieces."""
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnprst"]
    path = directory / "pieces.model"
    assert (
        train_tokenizer([" ".join(words[i::7]) for i in range(7)] * 5, path, 320).vocab_size == 320
    )
    return path


def parts_config(image_size: int = 28) -> RunConfig:
    config = RunConfig()
    config.model.vision = hf_config.read_clip(CLIP)
    config.model.vision.image_size = image_size
    config.model.decoder = hf_config.read_llama(LLAMA)
    config.model.abstractor = ABSTRACTOR
    config.train.precision = "fp32"
    return config


def editable(directory: Path, destination: Path, **config) -> Path:
    shutil.copytree(directory, destination)
    path = destination / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return destination


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(directory)
    return {name: reader[name] for name in reader.names()}


def run_tool(name: str, *arguments, capsys) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a tool, run in this process."""
    capsys.readouterr()
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before
    return stop.value.code, *capsys.readouterr()


def export(model: Owl2, output: Path, **options) -> None:
    """`export_hf` of a model in memory."""
    export_hf(of_model(model), model.model, output, **options)


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def is_table(name: str) -> bool:
    """Whether a tensor of the released layout is a position table of the abstractor."""
    return name.endswith(("q_pos_embed", "k_pos_embed"))
