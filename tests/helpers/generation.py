"""A small random model whose answers depend on prompt and images, and prompts for it."""

import random
from pathlib import Path

import torch

from megatron_owl2.config.schema import (
    AbstractorConfig,
    DecoderConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    VisionConfig,
)
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID, expand_placeholders, vision_token_index
from megatron_owl2.data.tokenizer import Tokenizer, train_tokenizer
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import Owl2

SIZE = 28


def build(model: ModelConfig) -> Owl2:
    config = RunConfig(model=model, parallel=ParallelConfig())
    config.train.precision = "fp32"
    return Owl2(ParallelContext(config, setup.initialize(ParallelConfig())), model).eval()


def train(folder: Path) -> Tokenizer:
    texts = [f"what color is the {w} one ? red blue green {w}" for w in ("top", "left", "right")]
    texts = ["USER: ASSISTANT: " + text for text in texts]
    return train_tokenizer(texts, folder / "tokenizer.model", vocab_size=320)


def random_model(tokenizer: Tokenizer) -> LoadedModel:
    model = ModelConfig(
        vision=VisionConfig(SIZE, 14, 32, 2, 4, 64),
        abstractor=AbstractorConfig(4, 2, 4, 64),
        decoder=DecoderConfig(tokenizer.vocab_size, 32, 3, 4, 2, 64, max_positions=64),
        image_mean=[0.2] * 3,  # not the defaults: a loader that forgets them answers otherwise
        image_std=[0.25] * 3,
        init_std=0.3,  # wide enough that answers depend on prompt and image
    )
    torch.manual_seed(7)
    owl = build(model)
    # A random model hardly ever ends: make EOS likely enough that rows end at different steps.
    with torch.no_grad():
        owl.output_layer.weight[tokenizer.eos_id] *= 2.0
    return LoadedModel(owl, model, tokenizer)


def cases(loaded: LoadedModel, n: int = 12) -> tuple[list[list[int]], list[list[torch.Tensor]]]:
    """Prompts with no, one or two images, of 3 to 20 ids."""
    rng = random.Random(3)
    generator = torch.Generator().manual_seed(3)
    prompts, images = [], []
    for i in range(n):
        words = [rng.randrange(3, loaded.tokenizer.vocab_size) for _ in range(rng.randrange(2, 18))]
        for _ in range(i % 3):
            words.insert(rng.randrange(len(words) + 1), IMAGE_TOKEN_ID)
        prompts.append([1, *words])
        shape = (3, SIZE, SIZE)
        images.append(
            [
                torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
                for _ in range(i % 3)
            ]
        )
    return prompts, images


def recompute(loaded, prompt_ids, images, steps, min_new_tokens=1) -> list[int]:
    """The answer of one prompt from `Owl2.forward` on the whole sequence at every step."""
    new: list[int] = []
    pixels = torch.stack(images) if images else torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    for step in range(steps):
        row = expand_placeholders([*prompt_ids, *new], loaded.config.tokens_per_image)
        with torch.no_grad():
            modality = torch.from_numpy(row.modality)[None]
            logits = loaded.model(
                torch.from_numpy(row.tokens)[None],
                pixels,
                vision_token_index(modality),
                modality,
                torch.arange(len(row.tokens))[None],
            )[0, -1]
        if step < min_new_tokens:
            logits[loaded.tokenizer.eos_id] = float("-inf")
        new.append(int(logits.argmax()))
        if new[-1] == loaded.tokenizer.eos_id:
            return new[:-1]
    return new
