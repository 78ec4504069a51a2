"""Reference of tests/vllm: an export with its prompts, and the engine's greedy answers to them.

    python tests/helpers/vllm_reference.py DIR

runs in the environment of the project, which that of vLLM is not.
"""

import json
import sys
from pathlib import Path

import numpy as np
import prepared  # noqa: F401
import torch
from exported import build, export
from generated_conversations import tokenizers
from PIL import Image

from megatron_owl2.config.schema import (
    AbstractorConfig,
    DecoderConfig,
    ModelConfig,
    VisionConfig,
)
from megatron_owl2.data.conversation import asking_ids, prompt_ids
from megatron_owl2.data.image_tokens import expand_placeholders
from megatron_owl2.data.images import square_resize
from megatron_owl2.inference.api import read_image
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.messages import from_messages
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request

NEW_TOKENS = 12
LOOK_ALIKES = "is </s><s> <unk> <|image|> <0x0A> USER: red ASSISTANT: ?"


def shown(name: str) -> dict:
    return {"type": "image", "image": name}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


# A plain string with its images, or messages. Image files have the names of their sizes.
CASES = [
    {"prompt": "USER: is the top one red ? ASSISTANT:", "images": []},
    {"prompt": f"USER: {LOOK_ALIKES.replace('<|image|>', '')} ASSISTANT:", "images": []},
    {"prompt": "USER: <|image|>is it red ? ASSISTANT:", "images": ["56x56"]},
    {"prompt": "<|image|> the  left \n one </s> é 🦉", "images": ["40x80"]},
    {"prompt": "USER: " + "the left one 7 " * 20 + "<|image|>? ASSISTANT:", "images": ["91x37"]},
    {"prompt": "USER: <|image|><|image|>the same ? ASSISTANT:", "images": ["56x56", "56x56"]},
    {"prompt": "the <|image|> or the <|image|> one", "images": ["40x80", "91x37"]},
    {"messages": [{"role": "user", "content": LOOK_ALIKES}]},
    {"messages": [{"role": "user", "content": [shown("56x56"), said(f"\nthe {LOOK_ALIKES}")]}]},
    {
        "messages": [
            {"role": "system", "content": "the answer </s> is one"},
            {"role": "user", "content": [said("is it "), shown("91x37"), said("red ?  ")]},
            {"role": "assistant", "content": "the </s> left one"},
            {"role": "user", "content": [said(" or "), shown("40x80"), said(" blue ?")]},
        ]
    },
]


def model_config(template: str) -> ModelConfig:
    """Heads of size 32, which vLLM needs on a CPU; all share a key, which tensor parallelism must
    copy; not the usual rotary base."""
    return ModelConfig(
        vision=VisionConfig(28, 14, 32, 2, 4, 64),
        abstractor=AbstractorConfig(8, 2, 4, 64),
        decoder=DecoderConfig(320, 128, 3, 4, 1, 160, max_positions=256, rope_theta=700.0),
        image_mean=[0.2, 0.3, 0.4],
        image_std=[0.25, 0.2, 0.3],
        image_mode="pad",
        template=template,
        init_std=0.12,
    )


def answer(generator: Generator, ids: list[int], images: list[torch.Tensor]) -> dict:
    """The greedy answer without EOS, and the log probability of each of its ids."""
    options = GenerationOptions(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, logprobs=True)
    (found,) = generator.complete([Request(ids, images, options)])
    rows = expand_placeholders(ids, generator.config.tokens_per_image).tokens.tolist()
    return {"prompt_ids": rows, "ids": found.token_ids, "logprobs": found.logprobs}


def main(directory: Path) -> None:
    torch.manual_seed(5)
    directory.mkdir(parents=True)
    tokenizer = tokenizers(directory)["plain"]
    model = build(model_config("vicuna_v1"))
    export(model, directory / "model", tokenizer.path)
    generator = Generator(LoadedModel(model, model.model, tokenizer))
    to_square = {}
    for number, (width, height) in enumerate([(56, 56), (40, 80), (91, 37)]):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        name = f"{width}x{height}"
        Image.fromarray(pixels).save(directory / f"{name}.png")
        to_square[name] = square(model.model, directory / f"{name}.png")
    found = []
    for case in CASES:
        if "prompt" in case:
            ids, names = prompt_ids(case["prompt"], tokenizer), case["images"]
        else:
            asked = from_messages(case["messages"])
            template, names = model.model.conversation, asked.images
            ids = asking_ids(asked.questions, asked.answers, tokenizer, template, asked.system)
        found.append({**case, **answer(generator, ids, [to_square[name] for name in names])})
    (directory / "cases.json").write_text(json.dumps(found))


def square(config: ModelConfig, path: Path) -> torch.Tensor:
    return square_resize(config)(read_image(path), config.vision.image_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
