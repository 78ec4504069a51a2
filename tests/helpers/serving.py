"""Servers of a tiny model in this process, requests to them, and what the offline engine says."""

import base64
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exported import grouped_model
from hf_dirs import small_tokenizer
from processes import wait_until
from tiny_data import encoded, make_image

from megatron_owl2.data import images as image_processing
from megatron_owl2.data.conversation import asking_ids
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import ServingError
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.messages import from_messages
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Completion, Request, Token
from megatron_owl2.inference.scheduler import Scheduler
from megatron_owl2.serving import server
from megatron_owl2.serving.limits import Limits
from megatron_owl2.serving.service import Service

POSITIONS = 512


def tiny_model(folder: Path) -> LoadedModel:
    """A random model whose answers depend on what it is asked and shown."""
    model = grouped_model()
    model.model.decoder.max_positions = POSITIONS  # of rotary positions, which are in no weight
    return LoadedModel(model, model.model, Tokenizer(small_tokenizer(folder)))


class SlowScheduler(Scheduler):
    """The scheduler, with a pause before every step that has work; `fault` is raised by the next
    step."""

    def __init__(self, loaded: LoadedModel, seconds: float = 0.0, max_batch: int = 32):
        super().__init__(loaded, max_batch=max_batch)
        self.seconds, self.fault = seconds, None

    def step(self) -> list[Token]:
        if self.active or self.waiting:
            time.sleep(self.seconds)
            if self.fault:
                raise self.fault
        return super().step()


@dataclass
class Running:
    """A server in a thread of this process; `failure` is what `serve` raised."""

    service: Service
    host: str
    port: int
    thread: threading.Thread
    failure: list[ServingError]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def end(self) -> None:
        """Begin its end and wait for it."""
        with contextlib.suppress(RuntimeError):  # its loop is closed
            self.service._loop.call_soon_threadsafe(self.service.end)
        self.thread.join(60)
        assert not self.thread.is_alive()

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> "Reply":
        """The reply to a request on a connection of its own; a body that is not bytes is JSON."""
        with contextlib.closing(self.connection()) as connection:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            sent = {"Content-Type": "application/json"} | headers
            connection.request(method, path, data, sent)
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())

    def chat(self, messages: Any, **fields: Any) -> "Reply":
        """The reply to a chat request; messages may be a question."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.request("POST", "/v1/chat/completions", {"messages": messages, **fields})

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=60)

    def metric(self, name: str) -> float:
        """The value of a metric, by its name with labels; 0 if it is not there."""
        lines = self.request("GET", "/metrics").data.decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0)


@dataclass(frozen=True)
class Reply:
    """Status, headers and body of a reply."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def text(self) -> str:
        return self.json["choices"][0]["message"]["content"]

    @property
    def error(self) -> dict[str, Any]:
        """The error body, whose form is checked."""
        (error,) = self.json.values()
        assert self.json.keys() == {"error"}
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        return error


@contextlib.contextmanager
def running(
    loaded: LoadedModel, limits: Limits | None = None, name: str = "tiny", **options: Any
) -> Iterator[Running]:
    """A server on a free port; `options` are those of build_service."""
    bound = server.listen("127.0.0.1", 0)
    host, port = bound.getsockname()
    service = server.build_service(loaded, name=name, limits=limits or Limits(), **options)
    failure: list[ServingError] = []

    def run() -> None:
        try:
            server.serve(service, bound)
        except ServingError as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    found = Running(service, host, port, thread, failure)
    try:
        wait_until(lambda: _answers(found))
        yield found
    finally:
        found.end()


def _answers(found: Running) -> bool:
    try:
        return found.request("GET", "/health").status == 200
    except ConnectionError:
        return False


def image_url(seed: int, kind: str = "PNG", **size: int) -> str:
    """A data URL of a random image."""
    data = base64.b64encode(encoded(make_image(seed, **size), kind)).decode()
    return f"data:image/{kind.lower()};base64,{data}"


def asked(question: str, *urls: str) -> list[dict[str, Any]]:
    """Messages that show images and ask a question."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def offline(loaded: LoadedModel, messages: list[dict[str, Any]], **options: Any) -> Completion:
    """What the offline engine answers to messages of the API, whose images are data URLs."""
    size, to_square = loaded.config.vision.image_size, image_processing.square_resize(loaded.config)

    def part(given: dict[str, Any]) -> dict[str, Any]:
        if given["type"] == "text":
            return given
        data = base64.b64decode(given["image_url"]["url"].partition(",")[2])
        return {"type": "image", "image": to_square(image_processing.decode(data), size)}

    def plain(message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        return message | {"content": content if isinstance(content, str) else [*map(part, content)]}

    one = from_messages([plain(message) for message in messages])
    template = loaded.config.conversation
    ids = asking_ids(one.questions, one.answers, loaded.tokenizer, template, one.system)
    request = Request(ids, one.images, GenerationOptions(**options))
    return Generator(loaded).complete([request])[0]
