"""Exported directories with their own code, and what transformers makes of them."""

from collections.abc import Iterator
from pathlib import Path

import hf_dirs
import pytest
import torch
from left_padding import left_padded
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_owl2.config.schema import (
    AbstractorConfig,
    DecoderConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    VisionConfig,
)
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import Owl2

ATTENTIONS = ("eager", "sdpa")


def offline(folder: Path) -> Iterator[None]:
    """transformers without a network, and its copies of the code under `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        yield


def build(model: ModelConfig) -> Owl2:
    config = RunConfig(model=model)
    config.train.precision = "fp32"
    return Owl2(ParallelContext(config, setup.initialize(ParallelConfig())), model).eval()


def grouped_model() -> Owl2:
    """A random model of ours in which two heads share a key, wide enough that answers differ."""
    torch.manual_seed(7)
    model = build(
        ModelConfig(
            vision=VisionConfig(28, 14, 32, 2, 4, 64),
            abstractor=AbstractorConfig(4, 2, 4, 64),
            decoder=DecoderConfig(320, 32, 3, 4, 2, 64, max_positions=96, rope_theta=5e3),
            image_mean=[0.2, 0.3, 0.4],
            image_std=[0.25, 0.2, 0.3],
            init_std=0.3,
        )
    )
    with torch.no_grad():
        model.output_layer.weight[Tokenizer.eos_id] *= 2.0  # so that rows end at different steps
    return model


def export(model: Owl2, directory: Path, tokenizer: Path | None = None) -> Path:
    hf_dirs.export(model, directory, tokenizer=tokenizer)
    return directory


def load(directory: Path, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


def batch(size: int, prompts: list[list[int]], images: list[list]) -> dict[str, torch.Tensor]:
    """Left-padded inputs of prompts with placeholders -200."""
    rows = left_padded(prompts, size)
    flat = [image for row in images for image in row]
    return {
        "input_ids": rows.tokens,
        "attention_mask": rows.valid.long(),
        "modality": rows.modality,
        "pixel_values": torch.stack(flat) if flat else None,
    }


def answers(model, inputs, **options) -> list[list[int]]:
    """The new ids, up to EOS."""
    rows = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(2)] if 2 in row else row for row in rows]
