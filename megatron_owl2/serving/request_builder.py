"""Requests of the engine from bodies of the API: images decoded, text in the model's template.

What takes time runs in threads beside the event loop.
"""

import asyncio
import base64
import binascii
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megatron_owl2.data import images as image_processing
from megatron_owl2.data.conversation import asking_ids
from megatron_owl2.errors import BadSampleError, InferenceError
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.messages import from_messages
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request
from megatron_owl2.serving.api_error import ApiError
from megatron_owl2.serving.fetch import ImageFetcher
from megatron_owl2.serving.limits import Limits
from megatron_owl2.serving.protocol import ChatRequest, ImagePart, parse

_THREADS = 2  # that decode images
_MAX_PIECE = 64  # more characters than a piece of any vocabulary has

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A request for the engine and how its answer is to be sent; `prompt_positions` are those of
    the decoder, the rows of images included."""

    request: Request
    prompt_positions: int
    stream: bool
    include_usage: bool


class RequestBuilder:
    """Bodies of the API to jobs; without a `fetcher` images come in data URLs alone."""

    def __init__(
        self, loaded: LoadedModel, name: str, limits: Limits, fetcher: ImageFetcher | None
    ):
        self._config, self._tokenizer = loaded.config, loaded.tokenizer
        self._name, self._limits, self._fetcher = name, limits, fetcher
        # Prompts do not wait behind images, which take longer.
        self._images, self._prompts = ThreadPoolExecutor(_THREADS), ThreadPoolExecutor(1)
        self._to_square = image_processing.square_resize(loaded.config)

    async def build(self, body: bytes) -> Job:
        """The job of a body; raises ApiError (400, 404) for what cannot be served."""
        chat = await _aside(self._prompts, lambda: self._checked(parse(body)))
        # An image that is shown again is decoded, and encoded, once.
        loading = {url: asyncio.create_task(self._image(url)) for url in chat.image_urls()}
        try:
            images = {url: await task for url, task in loading.items()}
        finally:
            for task in loading.values():
                task.cancel()
        return await _aside(self._prompts, lambda: self._job(chat, images))

    def close(self) -> None:
        """Let the threads end."""
        for pool in (self._images, self._prompts):
            pool.shutdown(wait=False, cancel_futures=True)

    def _checked(self, chat: ChatRequest) -> ChatRequest:
        """The same request, if it asks for this model and shows it no more than it may."""
        if chat.model is not None and chat.model != self._name:
            raise ApiError(
                404,
                f"there is no model {chat.model[:200]!r}; this server has {self._name!r}",
                param="model",
                code="model_not_found",
            )
        if len(chat.image_urls()) > self._limits.max_images:
            raise ApiError(
                400,
                f"{len(chat.image_urls())} images; a request has at most {self._limits.max_images}",
                param="messages",
                code="too_many_images",
            )
        wanted, limit = chat.new_tokens(), self._limits.max_tokens
        if wanted is not None and wanted > limit:
            raise ApiError(
                400,
                f"max_tokens is {wanted}; this server gives at most {limit}",
                param="max_completion_tokens" if chat.max_completion_tokens else "max_tokens",
            )
        return chat

    async def _image(self, url: str) -> torch.Tensor:
        """An image of the model's size, uint8 [3, H, W]."""
        if url[:5].lower() == "data:":
            return await _aside(self._images, lambda: self._decode(self._data(url)))
        if self._fetcher is None:
            raise _bad_image(
                "images must come as data URLs, data:image/png;base64,...; this server fetches none"
            )
        data = await self._fetcher.fetch(url)
        return await _aside(self._images, lambda: self._decode(data))

    def _data(self, url: str) -> bytes:
        """The bytes of a data URL."""
        header, comma, payload = url.partition(",")
        if not comma or not header[:256].lower().endswith(";base64"):
            raise _bad_image("a data URL must be data:image/...;base64,...")
        if len(payload) * 3 // 4 > self._limits.max_image_bytes + 2:
            raise self._too_large()
        try:
            return base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError):
            raise _bad_image("the data of an image are not base64") from None

    def _decode(self, data: bytes) -> torch.Tensor:
        if len(data) > self._limits.max_image_bytes:
            raise self._too_large()
        try:
            width, height = image_processing.image_size(data)
            if width * height > self._limits.max_image_pixels:
                raise _bad_image(
                    f"an image has {width} x {height} pixels; at most "
                    f"{self._limits.max_image_pixels} are taken"
                )
            size = self._config.vision.image_size
            return image_processing.load_square(data, size, to_square=self._to_square)
        except BadSampleError as error:
            raise _bad_image(f"an image cannot be used: {error}") from None

    def _too_large(self) -> ApiError:
        limit = self._limits.max_image_bytes
        return _bad_image(f"an image has more than {limit} bytes")

    def _job(self, chat: ChatRequest, images: dict[str, torch.Tensor]) -> Job:
        """The prompt in ids, and the options, within the decoder's positions."""
        self._check_characters(chat)
        try:
            asked = from_messages([_message(message, images) for message in chat.messages])
        except InferenceError as error:
            raise ApiError(400, str(error), param="messages") from None
        template = self._config.conversation
        prompt = asking_ids(asked.questions, asked.answers, self._tokenizer, template, asked.system)
        positions = len(prompt) + len(asked.images) * (self._config.tokens_per_image - 1)
        most, least = self._new_tokens(chat.new_tokens(), positions), max(1, chat.min_tokens or 0)
        if least > most:
            raise ApiError(
                400, f"min_tokens is {least}, and the answer has at most {most}", param="min_tokens"
            )
        try:
            options = GenerationOptions(most, least, **chat.sampling())
        except InferenceError as error:
            raise ApiError(400, str(error)) from None
        request = Request(prompt, asked.images, options)
        usage = bool(chat.stream_options and chat.stream_options.include_usage)
        return Job(request, positions, bool(chat.stream), usage)

    def _max_positions(self) -> int:
        """Positions for a prompt and its answer together."""
        most = self._config.decoder.max_positions
        return min(most, self._limits.max_positions or most)

    def _check_characters(self, chat: ChatRequest) -> None:
        """Refuse what is certainly too long before it costs the time to make ids of it."""
        texts = [
            part.text
            for m in chat.messages
            for part in m.content
            if not isinstance(part, ImagePart)
        ]
        if sum(map(len, texts)) > _MAX_PIECE * (limit := self._max_positions()):
            raise _too_long(f"the prompt takes more than {limit} positions, the limit")

    def _new_tokens(self, wanted: int | None, positions: int) -> int:
        """How many new tokens a prompt of so many positions may get; raises ApiError."""
        limit = self._max_positions()
        if positions > limit:
            raise _too_long(
                f"the prompt takes {positions} positions, {self._config.tokens_per_image} of them "
                f"for every image; the limit is {limit}"
            )
        left = limit - positions + 1  # the last token is never read
        if wanted is None:
            return min(left, self._limits.max_tokens)
        if wanted > left:
            raise _too_long(
                f"the prompt takes {positions} positions, and {wanted} new tokens would pass the "
                f"limit of {limit}; ask for at most {left}"
            )
        return wanted


async def _aside(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


def _message(message: Any, images: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A message in the form of `from_messages`."""
    content: list[dict[str, Any]] = [
        {"type": "image", "image": images[part.image_url.url]}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part.text}
        for part in message.content
    ]
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": content}


def _bad_image(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="invalid_image")


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="context_length_exceeded")
