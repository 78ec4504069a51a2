"""Inference API: a model that answers questions about images, from a checkpoint or an HF export.

`megatron_owl2.load` and the verb `generate` are this module's.
"""

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict, Unpack, overload

import torch
from PIL import Image

from megatron_owl2.config.schema import Precision
from megatron_owl2.data import images as image_processing
from megatron_owl2.data.conversation import asking_ids
from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.messages import (
    Conversation,
    Message,
    check_texts,
    from_messages,
    from_question,
)
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request
from megatron_owl2.mcore.setup import setup

if TYPE_CHECKING:
    from megatron_owl2.inference.loading import LoadedModel

ImageInput: TypeAlias = str | PathLike[str] | Image.Image | torch.Tensor


class OptionFields(TypedDict, total=False):
    """Keyword arguments of `generate`: the fields of `GenerationOptions`."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    stop: Sequence[str]
    seed: int
    beams: int
    length_penalty: float


class InferenceModel:
    """A loaded model that answers questions in the template that it was trained with."""

    def __init__(self, loaded: "LoadedModel"):
        from megatron_owl2.inference.engine import Generator

        self.config, self.tokenizer = loaded.config, loaded.tokenizer
        self.generator = Generator(loaded)

    @overload
    def generate(
        self, prompts: str, images: Sequence[ImageInput] = (), **options: Unpack[OptionFields]
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        images: Sequence[Sequence[ImageInput]] = (),
        **options: Unpack[OptionFields],
    ) -> list[str]: ...

    def generate(self, prompts, images=(), **options):
        """The answer to a question with its images, or the answers to a list of questions.

        images: for one question its images in order; for a list of questions one such list for
        each, or nothing. An image is a path, a Pillow image or a tensor uint8 [3, H, W] (RGB) of
        any size; the model's `image_mode` makes its square of it; a list of images is a video,
        whose frames take one place. Images go where the question has `<|image|>`, or before it if
        it has none; without images `<|image|>` is text. In place of a question in the list there
        may be a conversation, a list of messages with their own images (`messages.from_messages`).
        Questions of a list are answered together. `options` are the fields of `GenerationOptions`;
        the answer is greedy by default, of at most 64 tokens.
        Raises InferenceError if an image cannot be used, the placeholders and images differ in
        number, messages are not a conversation, an option is out of range, or the question and
        its answer exceed the decoder's positions; OSError for a file that cannot be read. Under
        torchrun all processes must make the same calls.
        """
        if isinstance(prompts, str):
            return self.generate([prompts], [images], **options)[0]
        rows = [_as_list(row) for row in images] or [[]] * len(prompts)
        if len(rows) != len(prompts):
            raise InferenceError(f"{len(prompts)} prompts, but images for {len(rows)}")
        chosen = GenerationOptions(**options)
        asked = [_conversation(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        completions = self.generator.complete([self.request(one, chosen) for one in asked])
        return [completion.text for completion in completions]

    def stream(self, messages: Sequence[Message], **options: Unpack[OptionFields]) -> Iterator[str]:
        """The answer to a conversation in pieces, as it comes; raises as `generate` does."""
        request = self.request(from_messages(messages), GenerationOptions(**options))
        return (token.text for token in self.generator.stream(request))

    def request(self, conversation: Conversation, options: GenerationOptions) -> Request:
        """The request that asks for the answer to a conversation; raises as `generate` does."""
        images = [self.pixels(image) for image in conversation.images]
        return Request(self.prompt_ids(conversation), images, options)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The ids, with -200 for every image, that ask for the answer to a conversation."""
        questions, answers = conversation.questions, conversation.answers
        check_texts(conversation)
        return asking_ids(
            questions, answers, self.tokenizer, self.config.conversation, conversation.system
        )

    def pixels(self, image: ImageInput | list[ImageInput]) -> torch.Tensor:
        """The square uint8 [3, H, W] of an image, [frames, 3, H, W] of a list of frames; raises
        InferenceError and OSError as `generate` does."""
        if isinstance(image, list | tuple):
            if not image:
                raise InferenceError("a video is a list of frames, and this one has none")
            return torch.stack([self.pixels(frame) for frame in image])
        size, to_square = self.config.vision.image_size, image_processing.square_resize(self.config)
        return to_square(read_image(image), size)


def load(
    path: str | PathLike[str],
    precision: Precision = "fp32",
    *,
    adapter: str | PathLike[str] | None = None,
) -> InferenceModel:
    """Load a model: an HF export, a run directory, its `checkpoints/` or one `iter_*`.

    `precision` is fp32 or bf16; `adapter` is a directory of peft, whose adapters are merged into
    the weights. Under torchrun the weights are split over all its processes. Raises InferenceError,
    CheckpointError, ConversionError or ConfigError, as `inference.loading.load_model` does.
    """
    setup()  # before the engine imports megatron-core
    from megatron_owl2.inference.loading import load_model

    merged = None if adapter is None else Path(adapter)
    return InferenceModel(load_model(Path(path), precision, adapter=merged))


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
    except ValueError as error:  # BadSampleError, or a path that no file can have
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
