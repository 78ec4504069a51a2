"""Endpoint `POST /v1/chat/completions`: whole answers and streamed ones, and clients that leave."""

import asyncio
import logging
from contextlib import suppress

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from megatron_owl2.inference.requests import Token
from megatron_owl2.serving.api_error import ApiError
from megatron_owl2.serving.body import read_body
from megatron_owl2.serving.engine import Answer
from megatron_owl2.serving.metrics import DISCONNECTED
from megatron_owl2.serving.request_builder import Job
from megatron_owl2.serving.responses import DONE, ChatCompletion, event
from megatron_owl2.serving.service import Service

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would keep tokens back
]
_SEND_SECONDS = 10.0  # for an answer that is complete, to a client that does not read

logger = logging.getLogger(__name__)


def error_response(error: ApiError) -> JSONResponse:
    """The response of an error."""
    return JSONResponse(error.body(), error.status, dict(error.headers or {}))


class ChatEndpoint:
    """ASGI application of the endpoint; a request whose client is gone is cancelled at once."""

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = DISCONNECTED
        try:
            status = await self._serve(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception as caught:
            if not isinstance(caught, ApiError):
                logger.exception("a request failed")
            known = isinstance(caught, ApiError)
            error = caught if known else ApiError(500, "the server failed; see its log")
            status = error.status
            await error_response(error)(scope, receive, send)
        finally:
            self._service.metrics.requests.labels(status).inc()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> int:
        """The status of the answer, which is sent, or of a client that is gone."""
        limits, request = self._service.limits, Request(scope, receive)
        with self._service.place():
            body = await read_body(request, limits)
            work = asyncio.create_task(self._answer(body, scope, send))
            gone = asyncio.create_task(_until_gone(receive))
            patience = limits.request_seconds + _SEND_SECONDS
            try:
                await asyncio.wait(
                    {work, gone}, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                return work.result() if work.done() else DISCONNECTED
            finally:
                work.cancel()
                gone.cancel()
                await asyncio.wait({work, gone})

    async def _answer(self, body: bytes, scope: Scope, send: Send) -> int:
        service, loop = self._service, asyncio.get_running_loop()
        started = loop.time()
        deadline = started + service.limits.request_seconds
        try:
            async with asyncio.timeout_at(deadline):
                job = await service.builder.build(body)
        except TimeoutError:
            raise ApiError(504, "the request took longer than its deadline") from None
        completion = ChatCompletion(job, service.name, service.tokenizer)
        with service.engine.submit(job.request, deadline) as answer:
            tokens = self._observed(job, completion, answer, started)
            if job.stream:
                return await _stream(completion, tokens, send)
            body_of_answer = completion.whole([token async for token in tokens])
        await JSONResponse(body_of_answer)(scope, _nothing, send)
        return 200

    async def _observed(self, job: Job, completion: ChatCompletion, answer: Answer, started: float):
        """The tokens of an answer, which the metrics count."""
        metrics, loop = self._service.metrics, asyncio.get_running_loop()
        first = None
        async for token in answer.tokens():
            if first is None:
                first = loop.time()
                metrics.first_token.observe(first - started)
                metrics.prompt_tokens.inc(job.prompt_positions)
            completion.count(token)
            metrics.new_tokens.inc(token.token_id is not None)
            if token.finish_reason and completion.new_tokens > 1:
                metrics.per_token.observe((loop.time() - first) / (completion.new_tokens - 1))
            yield token


async def _stream(completion: ChatCompletion, tokens, send: Send) -> int:
    """Send the events of an answer; what goes wrong before the first token has its own status."""
    token: Token = await anext(tokens)
    headers = {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
    await send(headers)
    await _send_event(send, event(completion.opening()))
    status = 200
    try:
        while True:
            for chunk in completion.chunks(token):
                await _send_event(send, event(chunk))
            if token.finish_reason is not None:
                break
            token = await anext(tokens)
    except ApiError as error:
        status = error.status
        await _send_event(send, event(error.body()))
    await send({"type": "http.response.body", "body": DONE, "more_body": False})
    return status


async def _send_event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
    # Tokens may have piled up; others, and the end of this client, come first.
    await asyncio.sleep(0)


async def _until_gone(receive: Receive) -> None:
    """Wait for the client to leave."""
    with suppress(ClientDisconnect):
        while (await receive())["type"] != "http.disconnect":
            pass


async def _nothing():
    """No message: the body has been read."""
    return {"type": "http.disconnect"}
