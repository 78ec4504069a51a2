"""A web server on loopback that sends byte ranges and misbehaves on request."""

import os
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

FOREVER = 10**9


class HttpServer:
    """Serves the files of a folder at `url` while inside `with`.

    `requests` lists what was asked: (method, file name, (start, stop) or None), `sent` counts the
    bytes of bodies by file name, `most_at_once` the answers in work at one time.

    A fault strikes the next `times` GET requests (of the files whose name ends in `name`): "hang"
    answers nothing, "hold" waits for `release`, "reset" cuts the connection in the middle of the
    body, "short" sends half of the bytes in an answer that is well-formed, "in full"
    ignores the range, "elsewhere" sends another range, "flip" one wrong byte, and a number is sent
    as the status.
    """

    def __init__(self, folder: os.PathLike):
        self.folder = Path(folder)
        self.requests: list[tuple[str, str, tuple[int, int] | None]] = []
        self.sent: Counter[str] = Counter()
        self.most_at_once = 0
        self._at_once = 0
        self._faults: list[list] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._released = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fail(self, kind: str | int, times: int = FOREVER, name: str = "") -> None:
        self._faults.append([kind, times, name])

    def heal(self) -> None:
        self._faults.clear()

    def release(self) -> None:
        """Let the held answers go, and those to come."""
        self._released.set()

    def ranges(self, name: str = "") -> list[tuple[int, int] | None]:
        """The ranges of the GET requests so far."""
        return [r for method, file, r in self.requests if method == "GET" and file.endswith(name)]

    def __enter__(self) -> "HttpServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._closing.set()
        self._released.set()
        self._server.shutdown()
        self._server.cut_connections()
        self._server.server_close()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def _take_fault(self, name: str) -> str | int | None:
        with self._lock:
            for fault in self._faults:
                if fault[1] > 0 and name.endswith(fault[2]):
                    fault[1] -= 1
                    return fault[0]
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close waits for them
    request_queue_size = 128

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._connections: set[socket.socket] = set()

    def process_request(self, request, client_address) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        """Those that clients keep alive, too; call it after the last was accepted."""
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        """Clients that give up are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet, or each answer waits for an acknowledgement
    disable_nagle_algorithm = True
    owner: HttpServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        with self.owner._at_work():
            self._answer(body=True)

    def _answer(self, body: bool) -> None:
        name = unquote(self.path).lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        span = (int(asked[1]), int(asked[2]) + 1) if asked else None
        self.owner.requests.append((self.command, name, span))
        kind = self.owner._take_fault(name) if body else None
        if kind == "hang":
            self.owner._closing.wait()
            self.close_connection = True
            return
        if kind == "hold":
            self.owner._released.wait()
        file = self.owner.folder / name
        if isinstance(kind, int) or not file.is_file():
            self._send(kind or 404, b"no", body=body)
            return
        data = file.read_bytes()
        size = len(data)
        if kind == "in full" or span is None:
            status, headers = 200, {}
        elif span[0] >= size:
            self._send(416, b"", {"Content-Range": f"bytes */{size}"}, body)
            return
        else:
            start, stop = span[0] + 7 * (kind == "elsewhere"), min(span[1], size)
            status, headers = 206, {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
            data = data[start:stop]
        if kind == "short":
            data = data[: len(data) // 2]
        if kind == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._send(status, data, headers, body, cut=kind == "reset")

    def _send(self, status: int, data: bytes, headers=None, body: bool = True, cut: bool = False):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            rest = memoryview(data)[: len(data) // 2 if cut else None]
            for start in range(0, len(rest), 1 << 20):
                self.wfile.write(rest[start : start + (1 << 20)])
                self.owner.sent[unquote(self.path).lstrip("/")] += len(rest[start:][: 1 << 20])
        self.close_connection = cut

    def log_message(self, *arguments) -> None:
        pass
