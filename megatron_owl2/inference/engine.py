"""Greedy generation from prompts with images: left-padded batches, cached keys and values.

A row of a batch gives the answer it gives alone: position ids start at its first token, and its
padding is invisible to it.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_owl2.config.schema import (
    KernelConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    RunConfig,
)
from megatron_owl2.config.validate_parallel import validate_parallel
from megatron_owl2.convert import hf_weights as hf
from megatron_owl2.data.conversation import prompt_ids
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
from megatron_owl2.data.tokenizer import Tokenizer, load_tokenizer
from megatron_owl2.errors import ConfigError, InferenceError
from megatron_owl2.inference.inputs import DecoderInputs, left_padded
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.decoder import KeyValueCache
from megatron_owl2.model.owl2 import Owl2, build
from megatron_owl2.training.checkpoint import directories, save_load


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its sizes, and its tokenizer."""

    model: Owl2
    config: ModelConfig
    tokenizer: Tokenizer


def load_model(
    path: str | Path, precision: Precision = "fp32", *, tensor_parallel: int | None = None
) -> LoadedModel:
    """The model of a checkpoint (run directory, its `checkpoints/` or one `iter_*`) or HF export.

    Under torchrun the weights are split over `tensor_parallel` of its processes, all of them if
    that is None, and these must make the same calls; other groups of as many hold the model once
    more. `precision` is fp32 or bf16. Raises InferenceError for a
    directory that is neither or has no fitting tokenizer, CheckpointError and ConversionError for
    damaged ones, ConfigError if the processes cannot split the model.
    """
    path = Path(path)
    if not path.is_dir():
        raise InferenceError(f"{path} is not a directory; name a checkpoint or an HF export")
    exported = _is_hf_export(path)
    if exported:
        config = RunConfig(model=hf.read_hf_config(path))
        config.data.tokenizer = str(path / "tokenizer.model")
    else:
        path = directories.resolve(path)
        config = directories.read_config(path)
    if not config.data.tokenizer:
        raise InferenceError(f"{path} has no tokenizer.model; put the model's own there")
    try:
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.decoder.vocab_size)
    except ConfigError as error:
        raise InferenceError(f"{path}: {error}") from None
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config.parallel = ParallelConfig(tensor=tensor_parallel or world_size)
    if world_size % config.parallel.tensor:
        raise ConfigError(
            f"{world_size} processes cannot be divided into groups of {config.parallel.tensor} "
            "(tensor parallel); start a multiple of it"
        )
    if exported:  # padded here, and not when a checkpoint was made
        decoder = config.model.decoder
        decoder.vocab_multiple = math.lcm(decoder.vocab_multiple, config.parallel.tensor)
    config.kernels = KernelConfig()
    config.train.precision = precision
    validate_parallel(config, config.parallel.tensor)
    groups = setup.initialize(config.parallel)
    context = ParallelContext(config, groups, device=setup.device())
    (model,) = build(context, config.model, initialize=False)
    if exported:
        hf.load_hf_weights(path, model)
    else:
        save_load.load_weights(path, [model])
    return LoadedModel(model.eval(), config.model, tokenizer)


class Generator:
    """Greedy generation with one loaded model."""

    def __init__(self, loaded: LoadedModel):
        self.model, self.config, self.tokenizer = loaded.model, loaded.config, loaded.tokenizer

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        images: Sequence[Sequence[torch.Tensor]],
        max_new_tokens: int,
        min_new_tokens: int = 1,
    ) -> list[str]:
        """The answers, stripped, to prompts with one `<|image|>` for each of their images, or to
        ids with -200 in its place.

        images: per prompt its images in order, [3, H, W] of the model's size, uint8 (or float,
        normalised already).
        Raises InferenceError as `generate_ids` does.
        """
        ids = [prompt_ids(p, self.tokenizer) if isinstance(p, str) else p for p in prompts]
        pieces = self.tokenizer.vocab_size  # the model may embed more, which have no text
        answers = self.generate_ids(ids, images, max_new_tokens, min_new_tokens, pieces)
        return [self.tokenizer.decode(answer).strip() for answer in answers]

    @torch.inference_mode()
    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Sequence[torch.Tensor]],
        max_new_tokens: int,
        min_new_tokens: int = 1,
        vocab_size: int | None = None,
    ) -> list[list[int]]:
        """New ids for prompts of ids with placeholders -200; EOS ends an answer and is left out.

        EOS cannot come before `min_new_tokens`, and no id from `vocab_size` on at all. An image
        that is the same tensor object in several prompts is encoded once. Raises InferenceError if
        a prompt is empty, its placeholders and images differ in number, an image has the wrong
        shape or dtype, or the answer could leave the decoder's positions.
        """
        self._check(prompts, images, max_new_tokens)
        if not prompts:
            return []
        inputs = left_padded(prompts, self.config.tokens_per_image, setup.device())
        visual = self._visual_tokens(images)
        caches = {n: KeyValueCache() for n in self.model.decoder.layers.numbers()}
        eos = self.tokenizer.eos_id
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=setup.device())
        chosen: list[torch.Tensor] = []
        while True:
            logits = self._next_logits(inputs, visual, caches)[:, :vocab_size]
            if logits.isnan().any():
                raise InferenceError(
                    "the model's logits are not numbers: its weights are damaged, or it diverged"
                )
            if len(chosen) < min_new_tokens:
                logits[:, eos] = float("-inf")
            token = logits.argmax(-1)
            chosen.append(token)
            finished |= token == eos
            if len(chosen) == max_new_tokens or bool(finished.all()):
                break
            inputs, visual = inputs.followed_by(token), visual[:0]
        rows = torch.stack(chosen, dim=1).tolist()
        return [row[: row.index(eos)] if eos in row else row for row in rows]

    def _next_logits(
        self, inputs: DecoderInputs, visual: torch.Tensor, caches: dict[int, KeyValueCache]
    ) -> torch.Tensor:
        """Logits after the last position, fp32 [b, vocab]."""
        model = self.model
        x = model.hidden_states(
            model.merge(inputs.tokens, visual, inputs.vision_token_index),
            inputs.modality,
            inputs.vision_token_index,
            inputs.position_ids,
            attention_mask=inputs.attention_mask,
            caches=caches,
        )
        return model.gather_logits(model.head(x[-1:]))[0].float()

    def _visual_tokens(self, images: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Visual tokens [n, tokens per image, h] of all images in order, equal objects once."""
        flat = [image for row in images for image in row]
        distinct = {id(image): image for image in flat}
        if not flat:
            shape = (0, self.config.tokens_per_image, self.config.decoder.hidden_size)
            return torch.empty(shape, dtype=self.model.context.dtype, device=setup.device())
        encoded = self.model.encode_images(torch.stack([*distinct.values()]).to(setup.device()))
        index = {key: i for i, key in enumerate(distinct)}
        return encoded[[index[id(image)] for image in flat]]

    def _check(self, prompts, images, max_new_tokens: int) -> None:
        if len(prompts) != len(images):
            raise InferenceError(f"{len(prompts)} prompts, but images for {len(images)}")
        if max_new_tokens < 1:
            raise InferenceError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        size, limit = self.config.vision.image_size, self.config.decoder.max_positions
        for number, (prompt, row) in enumerate(zip(prompts, images, strict=True), start=1):
            placeholders = list(prompt).count(IMAGE_TOKEN_ID)
            if len(prompt) == 0:
                raise InferenceError(f"prompt {number} is empty")
            if placeholders != len(row):
                raise InferenceError(
                    f"prompt {number} has {placeholders} placeholders {IMAGE_PLACEHOLDER}, but "
                    f"{len(row)} images; write one placeholder for each image"
                )
            for image in row:
                pixels = image.dtype == torch.uint8 or image.is_floating_point()
                if not pixels or image.shape != (3, size, size):
                    raise InferenceError(
                        f"an image of prompt {number} is {image.dtype} {list(image.shape)}; "
                        f"this model takes uint8 (or normalised float) [3, {size}, {size}]"
                    )
            length = len(prompt) + placeholders * (self.config.tokens_per_image - 1)
            if length + max_new_tokens - 1 > limit:  # the last new token is never read
                raise InferenceError(
                    f"prompt {number} takes {length} positions (an image takes "
                    f"{self.config.tokens_per_image}) and {max_new_tokens} new tokens would pass "
                    f"the decoder's {limit}; ask for at most {max(0, limit - length + 1)} new "
                    "tokens or shorten the prompt"
                )


def _is_hf_export(path: Path) -> bool:
    """Whether a directory is to be read as an export, damaged and foreign ones among them."""
    names = ("config.json", "adapter_config.json")
    return not (path / "run.yaml").exists() and any((path / name).exists() for name in names)
