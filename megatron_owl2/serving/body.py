"""Reading of request bodies within a size and a time."""

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request

from megatron_owl2.serving.api_error import ApiError
from megatron_owl2.serving.limits import Limits

_LINGER = 4  # bodies of the greatest size that are read on for a client to see why it is refused
_CLOSE = {"Connection": "close"}


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request in JSON.

    Raises ApiError for another type (415), a body that is too large (413) or too slow (408), and
    ClientDisconnect.
    """
    length = request.headers.get("content-length", "0")
    too_large = not length.isdecimal() or int(length[:20]) > limits.max_body
    body, seen = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            if not (too_large and "expect" in request.headers):  # that one asks before it sends
                async for piece in _pieces(request):
                    seen += len(piece)
                    too_large = too_large or seen > limits.max_body
                    if too_large:
                        body.clear()
                    else:
                        body += piece
                    if seen > _LINGER * limits.max_body:
                        break
    except TimeoutError:
        if not too_large:
            message = f"the body took more than {limits.body_seconds:g} seconds"
            raise ApiError(408, message, headers=_CLOSE) from None
    if too_large:
        message = f"the body has more than {limits.max_body} bytes, the limit"
        raise ApiError(413, message, headers=_CLOSE)
    # A page of another site can send other types without asking; this one it cannot.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the Content-Type must be application/json")
    return bytes(body)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """The pieces of a body as they come."""
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        yield message.get("body", b"")
        more = message.get("more_body", False)
