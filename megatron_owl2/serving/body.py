"""Reading of request bodies within a size and a time."""

import asyncio
from contextlib import suppress

from starlette.requests import ClientDisconnect, Request

from megatron_owl2.serving.api_error import ApiError
from megatron_owl2.serving.limits import Limits

_LINGER_SECONDS = 5.0
_LINGER_SIZE = 4  # bodies of the greatest size


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request in JSON.

    Raises ApiError for another type (415), a body that is too large (413) or too slow (408), and
    ClientDisconnect.
    """
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _read(request, limits.max_body)
    except TimeoutError:
        message = f"the body took more than {limits.body_seconds:g} seconds"
        raise ApiError(408, message, headers={"Connection": "close"}) from None
    if body is None:
        message = f"the body has more than {limits.max_body} bytes, the limit"
        raise ApiError(413, message, headers={"Connection": "close"})
    # A page of another site can send other types without asking; this one it cannot.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the Content-Type must be application/json")
    return body


async def _read(request: Request, limit: int) -> bytes | None:
    """The body, or None if it is larger than the limit."""
    length = request.headers.get("content-length", "0")
    if not (length.isdecimal() and int(length[:20]) <= limit):
        await _discard(request, limit)
        return None
    body = bytearray()
    stream = request.stream()
    async for piece in stream:
        body += piece
        if len(body) > limit:
            body.clear()
            await _discard(request, limit)
            return None
    return bytes(body)


async def _discard(request: Request, limit: int) -> None:
    """Read on for a while: a client that is cut off while it sends never sees the answer."""
    if "expect" in request.headers:
        return  # it asked before sending
    seen = 0
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_LINGER_SECONDS):
            while seen < _LINGER_SIZE * limit:
                message = await request.receive()
                seen += len(message.get("body", b""))
                if not message.get("more_body"):
                    return
