"""Chat requests in OpenAI's form: their fields, and those that are refused because they would
change the answer."""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from megatron_owl2.serving.api_error import ApiError
from megatron_owl2.utils.suggest import did_you_mean

# Fields of features that this model lacks, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "top_logprobs": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None, "none"),
}
# Fields that change nothing about an answer.
_IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
# Of messages, which clients send back as they got them.
_MESSAGE_NEUTRAL = ("refusal", "annotations", "audio", "tool_calls", "function_call")

_MAX_PARTS = 4096  # messages of a request, and parts of a message
_MAX_VALUES = 1 << 16  # of JSON in a body, about


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A text between the images of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Address of an image; its `detail` is that of the model, whatever is asked for."""

    url: str


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl

    @field_validator("image_url", mode="before")
    @classmethod
    def _plain_address(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class ChatMessage(_Strict):
    """A message; a content that is a text has one part."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(
        max_length=_MAX_PARTS
    )

    @field_validator("content", mode="before")
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of `POST /v1/chat/completions`.

    A temperature that is not given is 0, greedy decoding, as in the rest of this project (OpenAI's
    is 1). A seed that is not given is drawn.
    """

    messages: list[ChatMessage] = Field(min_length=1, max_length=_MAX_PARTS)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        None, max_length=4
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def new_tokens(self) -> int | None:
        """The bound on new tokens that was asked for, under its newer name or its older."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    def sampling(self) -> dict[str, Any]:
        """Fields of GenerationOptions that concern the choice of tokens."""
        drawn = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        return {
            "temperature": self.temperature or 0.0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": max(self.top_k or 0, 0),
            "repetition_penalty": self.repetition_penalty or 1.0,
            "stop": tuple(self.stop or ()),
            "seed": drawn,
            "logprobs": bool(self.logprobs),
        }

    def image_urls(self) -> list[str]:
        """Addresses of all images in order."""
        parts = (part for message in self.messages for part in message.content)
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


def parse(body: bytes) -> ChatRequest:
    """The request of a body; raises ApiError (400) for one that is none, or asks for what this
    model lacks."""
    # Values are made one by one while all other threads wait, so too many are not even read. Images
    # hold no such characters, and a text with so many is too long for every decoder.
    if sum(body.count(character) for character in b"[{,") > _MAX_VALUES:
        raise ApiError(400, f"the body holds more than {_MAX_VALUES} values")
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object with model and messages")
    for name, value in fields.items():
        _check_field(name, value)
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None
    for number, message in enumerate(request.messages):
        _check_message(number, message)
    if request.stream_options and not request.stream:
        raise ApiError(400, "stream_options need stream", param="stream_options")
    return request


def _check_field(name: str, value: Any) -> None:
    if name in _NEUTRAL:
        if value not in _NEUTRAL[name]:
            neutral = _NEUTRAL[name][-1]
            hint = "leave it out" if neutral is None else f"leave it out or give {neutral!r}"
            message = f"{name} is not supported by this model; {hint}"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    elif name not in ChatRequest.model_fields and name not in _IGNORED:
        known = [*ChatRequest.model_fields, *_NEUTRAL]
        hint = did_you_mean(name, known)
        message = f"there is no field {name[:64]!r}; {hint}"
        raise ApiError(400, message, param=name[:64], code="unknown_parameter")


def _check_message(number: int, message: ChatMessage) -> None:
    for name in _MESSAGE_NEUTRAL:
        if (message.model_extra or {}).get(name):
            param = f"messages.{number}.{name}"
            raise ApiError(400, f"{param} is not supported by this model", param=param)


def _refusal(error: ValidationError) -> ApiError:
    """The first complaint of pydantic, with the path of the field as clients wrote it."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    path: list[str] = []
    for place, part in enumerate(first["loc"]):
        tag = place >= 2 and first["loc"][place - 2] == "content"  # the kind of a part
        path += [] if tag else [str(part)]
    param = ".".join(path)
    return ApiError(400, f"{param}: {first['msg']}", param=param)
