"""Requests to a model and what comes back: tokens one by one, or the completion as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID, ExpandedRow, expand_placeholders
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.options import GenerationOptions

FinishReason = Literal["stop", "length"]  # an end token or stop string; the length limit


@dataclass
class Request:
    """A prompt of ids, with -200 in the place of every image, to be continued.

    images: in order, uint8 (or float, normalised already) [3, H, W] of the model's size, or
    [frames, 3, H, W] of a video, whose frames take the place of one placeholder one after the
    other, as in the official code, or together that of one image with `model.vision.temporal`. The
    same tensor object in several requests is encoded once.
    """

    prompt: Sequence[int]
    images: Sequence[torch.Tensor] = ()
    options: GenerationOptions = field(default_factory=GenerationOptions)

    def seen(self, pieces: int) -> list[int]:
        """The ids of its text among the first `pieces`, for a repetition penalty."""
        return [token for token in self.prompt if 0 <= token < pieces]


@dataclass(frozen=True)
class Token:
    """A new token of request number `request`, and the text that it lets go.

    `text` consists of whole characters and of nothing that may become a stop string, so it may be
    empty. The last token has a `finish_reason`; its `token_id` is None if it is the end token.
    """

    request: int
    token_id: int | None
    text: str
    logprob: float | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """The answer to a request: new ids without the end token, and their text, stripped.

    `logprobs` are those of the ids, if asked for; `prompt_positions` counts the prompt's positions
    in the decoder, image rows included.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[float] | None
    prompt_positions: int


def expand(
    request: Request, model: ModelConfig, name: str, limit: int | None = None
) -> ExpandedRow:
    """The prompt of a request with the rows of its images; `name` is what errors call it.

    `limit` is the number of positions for prompt and answer, by default the decoder's. Raises
    InferenceError if the prompt is empty, its placeholders and images differ in number, an image
    has the wrong shape or dtype, or the answer could leave these positions.
    """
    images, size = request.images, model.vision.image_size
    placeholders = list(request.prompt).count(IMAGE_TOKEN_ID)
    if len(request.prompt) == 0:
        raise InferenceError(f"{name} is empty")
    vocabulary = model.decoder.vocab_size
    unknown = [i for i in request.prompt if not 0 <= i < vocabulary and i != IMAGE_TOKEN_ID]
    if unknown:
        raise InferenceError(
            f"{name} has the id {unknown[0]}, and this model embeds ids from 0 to {vocabulary - 1}"
        )
    if placeholders != len(images):
        raise InferenceError(
            f"{name} has {placeholders} placeholders {IMAGE_PLACEHOLDER}, but "
            f"{len(images)} images; write one placeholder for each image"
        )
    for image in images:
        pixels = image.dtype == torch.uint8 or image.is_floating_point()
        frames = image.shape[0] if image.dim() == 4 else 1
        if not pixels or not frames or image.shape[-3:] != (3, size, size) or image.dim() > 4:
            raise InferenceError(
                f"an image of {name} is {image.dtype} {list(image.shape)}; this model takes uint8 "
                f"(or normalised float) [3, {size}, {size}], or [frames, 3, {size}, {size}]"
            )
    apart = not model.vision.temporal  # a video's frames have visual tokens of their own
    counts = [len(image) if image.dim() == 4 and apart else 1 for image in images]
    row = expand_placeholders(request.prompt, model.tokens_per_image, images_per_placeholder=counts)
    limit = limit or model.decoder.max_positions
    length, new = len(row.tokens), request.options.max_new_tokens
    if length + new - 1 > limit:  # the last new token is never read
        raise InferenceError(
            f"{name} takes {length} positions (an image takes {model.tokens_per_image}) and "
            f"{new} new tokens would pass the decoder's {limit}; ask for at most "
            f"{max(0, limit - length + 1)} new tokens or shorten the prompt"
        )
    return row
