"""Download of images that a request names by an address, without a way into the server's network.

The name is resolved once, every address of it must be public, and the connection goes to an address
that was checked; redirects are followed by the same rule. Proxies of the environment are not used.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from megatron_owl2.serving.addresses import is_public
from megatron_owl2.serving.api_error import ApiError

_PORTS = {"http": 80, "https": 443}
_MAX_URL = 2048
_PIECE = 1 << 16
# Every piece of an answer in chunks costs time in which nobody else is served.
_EVENTS, _PIECE_OF_EVENT = 1000, 512

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]


class _FetchError(Exception):
    """A reason why an image could not be fetched, for the client."""


async def resolve(host: str, port: int) -> list[str]:
    """The numeric addresses of a host, by the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)  # SOCK_STREAM
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True)
class ImageFetcher:
    """Download of at most `max_bytes` in `seconds`, which include redirects.

    `ports` are allowed beside 80 and 443. `resolver`, `permits` (whether an address may be
    connected to) and `tls` are there for tests.
    """

    max_bytes: int
    seconds: float = 10.0
    ports: frozenset[int] = frozenset()
    max_redirects: int = 3
    resolver: Resolver = resolve
    permits: Callable[[str], bool] = is_public
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    async def fetch(self, url: str) -> bytes:
        """The bytes at an address; raises ApiError (400) that says why there are none."""
        try:
            async with asyncio.timeout(self.seconds):
                return await self._follow(url)
        except _FetchError as error:
            reason = str(error)
        except TimeoutError:
            reason = f"it took more than {self.seconds:g} seconds"
        except (OSError, h11.RemoteProtocolError):
            reason = "the connection failed"
        message = f"the image at {url[:200]!r} cannot be fetched: {reason}"
        raise ApiError(400, message, param="messages", code="image_fetch_failed")

    async def _follow(self, url: str) -> bytes:
        for _ in range(self.max_redirects + 1):
            parts = self._check(url)
            address = await self._address(parts)
            found, data = await self._get(parts, address)
            if not found:
                return data
            try:
                url = urljoin(url, found)
            except ValueError:
                raise _FetchError("it redirects to what is not an address") from None
        raise _FetchError(f"it redirects more than {self.max_redirects} times")

    def _check(self, url: str) -> SplitResult:
        """The parts of an address that may be asked for; raises _FetchError."""
        if len(url) > _MAX_URL or not all("!" <= letter <= "~" for letter in url) or "\\" in url:
            raise _FetchError(f"addresses are up to {_MAX_URL} characters of ASCII without spaces")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise _FetchError("it is not an address") from None
        if parts.scheme not in _PORTS or not parts.hostname:
            raise _FetchError("only http and https with a host are fetched")
        if "@" in parts.netloc:
            raise _FetchError("addresses must not hold a user name or password")
        if port is not None and port not in self.ports and port not in _PORTS.values():
            raise _FetchError(f"port {port} is not allowed")
        return parts

    async def _address(self, parts: SplitResult) -> str:
        """The numeric address to connect to; raises _FetchError if one of the host's is not
        public."""
        host = parts.hostname or ""
        try:
            found = await self.resolver(host, _port(parts))
        except (OSError, UnicodeError):
            found = []
        if not found:
            raise _FetchError("its host is unknown")
        if not all(map(self.permits, found)):
            raise _FetchError("its host is not in the public internet")
        return found[0]

    async def _get(self, parts: SplitResult, address: str) -> tuple[str | None, bytes]:
        """The place that an answer redirects to, or None and its body."""
        secure = parts.scheme == "https"
        reader, writer = await asyncio.open_connection(
            address,
            _port(parts),
            ssl=self.tls if secure else None,
            server_hostname=parts.hostname if secure else None,
        )
        try:
            connection = h11.Connection(h11.CLIENT)
            writer.write(connection.send(_request(parts)) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            await writer.drain()
            return await self._read(connection, reader)
        finally:
            writer.transport.abort()
            with suppress(Exception):
                await writer.wait_closed()

    async def _read(
        self, connection: h11.Connection, reader: asyncio.StreamReader
    ) -> tuple[str | None, bytes]:
        data, received, events = bytearray(), 0, 0
        while True:
            event = connection.next_event()
            events += 1
            if events > _EVENTS + received // _PIECE_OF_EVENT:
                raise _FetchError("the server sends it in pieces that are too small")
            if event is h11.NEED_DATA:
                piece = await reader.read(_PIECE)
                received += len(piece)
                connection.receive_data(piece)
            elif isinstance(event, h11.Response):
                headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
                if event.status_code in (301, 302, 303, 307, 308) and "location" in headers:
                    return headers["location"], b""
                if event.status_code != 200:
                    raise _FetchError(f"the server answers with status {event.status_code}")
                if headers.get("content-encoding", "identity") != "identity":
                    raise _FetchError("the server compresses it, unasked")
                self._check_size(int(headers.get("content-length", 0)))
            elif isinstance(event, h11.Data):
                data += event.data
                self._check_size(len(data))
            elif isinstance(event, h11.EndOfMessage):
                return None, bytes(data)
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                raise _FetchError("the connection failed")

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise _FetchError(f"it has more than {self.max_bytes} bytes")


def _port(parts: SplitResult) -> int:
    return parts.port or _PORTS[parts.scheme]


def _request(parts: SplitResult) -> h11.Request:
    headers = [
        ("Host", parts.netloc),
        ("User-Agent", "megatron-owl2"),
        ("Accept", "image/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return h11.Request(method="GET", target=target, headers=headers)
