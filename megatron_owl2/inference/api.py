"""Inference API: a model that answers questions about images, from a checkpoint or an HF export.

`megatron_owl2.load` and the verb `generate` are this module's.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, overload

import torch
from PIL import Image

from megatron_owl2.config.schema import Precision
from megatron_owl2.config.templates import TEMPLATES
from megatron_owl2.data import images as image_processing
from megatron_owl2.data.conversation import asking_ids
from megatron_owl2.errors import BadSampleError, InferenceError
from megatron_owl2.inference.messages import (
    Conversation,
    Message,
    from_messages,
    from_question,
)
from megatron_owl2.mcore.setup import setup

if TYPE_CHECKING:
    from megatron_owl2.inference.engine import LoadedModel

ImageInput: TypeAlias = str | PathLike[str] | Image.Image | torch.Tensor


class InferenceModel:
    """A loaded model that answers questions, greedily, in the template that it was trained with."""

    def __init__(self, loaded: "LoadedModel"):
        from megatron_owl2.inference.engine import Generator

        self.config, self.tokenizer = loaded.config, loaded.tokenizer
        self._generator = Generator(loaded)

    @overload
    def generate(
        self, prompts: str, images: Sequence[ImageInput] = (), *, max_new_tokens: int = 64
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        images: Sequence[Sequence[ImageInput]] = (),
        *,
        max_new_tokens: int = 64,
    ) -> list[str]: ...

    def generate(self, prompts, images=(), *, max_new_tokens=64):
        """The answer to a question with its images, or the answers to a list of questions.

        images: for one question its images in order; for a list of questions one such list for
        each, or nothing. An image is a path, a Pillow image or a tensor uint8 [3, H, W] (RGB) of
        any size; the model's `image_mode` makes its square of it. Images go where the question has
        `<|image|>`, or before it if it has none; without images `<|image|>` is text. In place of a
        question in the list there may be a conversation, a list of messages with their own images
        (`messages.from_messages`). Questions of a list are answered in one batch.
        An answer has at most `max_new_tokens` tokens.
        Raises InferenceError if an image cannot be used, the placeholders and images differ in
        number, messages are not a conversation, or the question and its answer exceed the decoder's
        positions; OSError for a file that cannot be read. Under torchrun all processes must make
        the same calls.
        """
        if isinstance(prompts, str):
            return self.generate([prompts], [images], max_new_tokens=max_new_tokens)[0]
        rows = [_as_list(row) for row in images] or [[]] * len(prompts)
        if len(rows) != len(prompts):
            raise InferenceError(f"{len(prompts)} prompts, but images for {len(rows)}")
        asked = [_conversation(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        size, to_square = self.config.vision.image_size, image_processing.square_resize(self.config)
        pixels = [[to_square(read_image(image), size) for image in one.images] for one in asked]
        template = TEMPLATES[self.config.template]
        ids = [
            asking_ids(one.questions, one.answers, self.tokenizer, template, one.system)
            for one in asked
        ]
        return self._generator.generate(ids, pixels, max_new_tokens)


def load(path: str | PathLike[str], precision: Precision = "fp32") -> InferenceModel:
    """Load a model: an HF export, a run directory, its `checkpoints/` or one `iter_*`.

    `precision` is fp32 or bf16. Under torchrun the weights are split over all its processes.
    Raises InferenceError, CheckpointError, ConversionError or ConfigError, as
    `inference.engine.load_model` does.
    """
    setup()  # before the engine imports megatron-core
    from megatron_owl2.inference.engine import load_model

    return InferenceModel(load_model(Path(path), precision))


def read_image(image: ImageInput) -> torch.Tensor:
    """An image as uint8 [3, H, W] of its own size, from a path, a Pillow image or such a tensor.

    Raises InferenceError if it cannot be decoded or is none of these, OSError if its file cannot
    be read.
    """
    name = image if isinstance(image, str | PathLike) else "an image"
    try:
        if isinstance(image, torch.Tensor):
            return image_processing.check_tensor(image)
        if isinstance(image, Image.Image):
            return image_processing.from_pillow(image)
        if isinstance(image, str | PathLike):
            return image_processing.decode(Path(image).read_bytes())
    except BadSampleError as error:
        raise InferenceError(f"{name}: {error}") from None
    raise InferenceError(
        f"an image is of type {type(image).__name__}; give a path, a Pillow image or a tensor "
        "uint8 [3, H, W]"
    )


def _conversation(prompt: str | Sequence[Message], images: list[ImageInput]) -> Conversation:
    """A question with its images, or messages, which have their own."""
    if isinstance(prompt, str):
        return from_question(prompt, images)
    if images:
        raise InferenceError(
            "messages have their images in them: {'type': 'image', 'image': image} in a content"
        )
    return from_messages(prompt)


def _as_list(images: Sequence[ImageInput]) -> list[ImageInput]:
    """The images of one question; raises InferenceError for one image without a list."""
    if isinstance(images, str | PathLike | Image.Image | torch.Tensor):
        raise InferenceError("images of a question are a list: images=[image], also for one image")
    return list(images)
