"""Thread of the engine as the server's event loop sees it: requests in, tokens out."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.requests import Request, Token
from megatron_owl2.inference.scheduler import Scheduler
from megatron_owl2.serving import engine_loop
from megatron_owl2.serving.api_error import ApiError, shutting_down
from megatron_owl2.serving.engine_loop import Admit, Cancel, Event, Inbox, Source, Stop

_STOP_SECONDS = 30.0  # for the step under way; one that hangs, as when another rank died, is left


class Answer:
    """Tokens of one request, as they come; ends after the one with a finish reason.

    Iterating raises ApiError where there will be no more: the request cannot be served (400), its
    time is over, the server ends, or the engine failed.
    """

    def __init__(self) -> None:
        self.finished = False
        self._events: asyncio.Queue[Token | ApiError] = asyncio.Queue()

    def put(self, event: Token | ApiError) -> None:
        """Add a token, or the reason why there are no more."""
        self._events.put_nowait(event)

    async def tokens(self) -> AsyncIterator[Token]:
        """The tokens; for one consumer."""
        while not self.finished:
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            self.finished = event.finish_reason is not None
            yield event


class Engine:
    """The thread that owns the scheduler of this process, alone or rank 0.

    `failure` is the error that ended it, if one did; `on_failure` is called in the event loop then.
    """

    def __init__(self, scheduler: Scheduler, source: Source, inbox: Inbox):
        self.failure: BaseException | None = None
        self._scheduler, self._source, self._inbox = scheduler, source, inbox
        self._answers: dict[int, Answer] = {}
        self._tickets = itertools.count()
        self._closed: ApiError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def active(self) -> int:
        """Number of requests that are being generated."""
        return self._scheduler.active

    @property
    def waiting(self) -> int:
        """Number of requests that the scheduler has no room for yet."""
        return self._scheduler.waiting

    def start(self, on_failure: Callable[[], None]) -> None:
        """Begin; called in the event loop that answers requests."""
        self._loop, self._on_failure = asyncio.get_running_loop(), on_failure
        self._thread.start()

    @contextmanager
    def submit(self, request: Request, deadline: float) -> Iterator[Answer]:
        """The answer to a request, which is cancelled at the block's end if it is unfinished.

        At `deadline`, a time of the event loop, it ends with ApiError 504.
        """
        if self._closed:
            raise self._closed
        ticket, answer = next(self._tickets), Answer()
        late = ApiError(504, "the request took longer than its deadline", code="deadline_exceeded")
        timer = self._loop.call_at(deadline, answer.put, late)
        self._answers[ticket] = answer
        self._inbox.put(Admit(ticket, request))
        try:
            yield answer
        finally:
            timer.cancel()
            del self._answers[ticket]
            if not answer.finished:
                self._inbox.put(Cancel(ticket))

    def close(self, error: ApiError) -> None:
        """End all requests, and later ones, with an error."""
        self._closed = self._closed or error
        for answer in self._answers.values():
            answer.put(error)

    async def stop(self) -> None:
        """End all requests and the thread, on other ranks too."""
        self.close(shutting_down())
        self._inbox.put(Stop())
        await asyncio.to_thread(self._thread.join, _STOP_SECONDS)

    def _run(self) -> None:
        try:
            engine_loop.run(self._scheduler, self._source, self._send)
        except BaseException as error:  # told by the server, which ends
            self.failure = error
            self._loop.call_soon_threadsafe(self._fail)

    def _send(self, events: list[Event]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        for ticket, event in events:
            if answer := self._answers.get(ticket):
                refused = isinstance(event, InferenceError)
                answer.put(ApiError(400, str(event), param="messages") if refused else event)

    def _fail(self) -> None:
        self.close(ApiError(500, "the engine failed; the server ends", code="engine_error"))
        self._on_failure()
