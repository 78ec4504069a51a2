"""Service behind the routes: the model, its engine, its limits, and the places of requests."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.serving.api_error import ApiError, shutting_down
from megatron_owl2.serving.engine import Engine
from megatron_owl2.serving.fetch import ImageFetcher
from megatron_owl2.serving.limits import Limits
from megatron_owl2.serving.metrics import Metrics
from megatron_owl2.serving.request_builder import RequestBuilder


class Service:
    """What the endpoints share; `name` is the model's for clients."""

    def __init__(
        self,
        loaded: LoadedModel,
        engine: Engine,
        *,
        name: str,
        limits: Limits,
        fetcher: ImageFetcher | None = None,
    ):
        self.name, self.limits, self.engine = name, limits, engine
        self.tokenizer = loaded.tokenizer
        self.metrics = Metrics(engine)
        self.builder = RequestBuilder(loaded, name, limits, fetcher)
        self.draining = False
        self._open = 0

    @property
    def places(self) -> int:
        """How many requests are taken at a time."""
        return self.limits.max_batch + self.limits.max_queue

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request from its first byte to its answer's last.

        Raises ApiError if there is none (429) or the server ends (503).
        """
        if self.draining:
            raise shutting_down()
        if self._open >= self.places:
            raise ApiError(
                429,
                f"{self._open} requests are being served, as many as there are places; ask again",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self._open += 1
        self.metrics.open.set(self._open)
        try:
            yield
        finally:
            self._open -= 1
            self.metrics.open.set(self._open)

    def why_unhealthy(self) -> str | None:
        """The reason why requests are not answered, if they are not."""
        if self.engine.failure:
            return f"the engine failed: {type(self.engine.failure).__name__}"
        return "shutting down" if self.draining else None

    def start(self, on_end: Callable[[], None]) -> None:
        """Begin to serve, in the event loop; `on_end` is called there when the end begins."""
        self._loop, self._on_end = asyncio.get_running_loop(), on_end
        self.engine.start(on_failure=self.end)

    def end(self) -> None:
        """Take no more requests, and end those that are left after `grace_seconds`, or at once if
        asked again."""
        if self.draining:
            self.engine.close(shutting_down())
            return
        self.draining = True
        self._loop.call_later(self.limits.grace_seconds, self.engine.close, shutting_down())
        self._on_end()

    async def stop(self) -> None:
        """End all threads, and the other ranks."""
        await self.engine.stop()
        self.builder.close()
