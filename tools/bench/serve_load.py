"""Load on a server: clients with good, bad, oversized and abandoned requests, and what they saw."""

import base64
import http.client
import io
import json
import random
import re
import statistics
import struct
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from PIL import Image

PATH = "/v1/chat/completions"
QUESTIONS = ("what is this?", "what color is it?", "how many are there?", "describe the image.")
SHARES = {"text": 8, "images": 6, "streamed": 4, "left": 2, "bad": 3, "oversized": 0.1}
MAX_BODY = 32 << 20
LONGEST_LEAVE = 1.0  # seconds until the place of a client that is gone is free
UNSEEN = 0.05  # share of those that left whose answer may have been there before
GROWTH = 3.0  # MiB a minute that noise may look like


@dataclass(frozen=True)
class Case:
    """A conversation and its answer by the offline engine."""

    messages: list[dict[str, Any]]
    text: str

    @property
    def has_images(self) -> bool:
        return isinstance(self.messages[0]["content"], list)


@dataclass
class Figures:
    """What the clients saw; `seconds` by kind of request, `wrong` what must not be."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    left: list[float] = field(default_factory=list)
    unseen: int = 0  # clients that were not counted as gone
    memory: list[tuple[float, float]] = field(default_factory=list)  # (seconds, MiB)
    tokens: int = 0
    different: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def growth(self) -> float:
        """MiB a minute, by least squares over the second half of the time."""
        late = self.memory[len(self.memory) // 2 :]
        if len(late) < 3:
            return 0.0
        times, sizes = np.array(late).T
        return float(np.polyfit(times, sizes, 1)[0] * 60)

    def failures(self) -> list[str]:
        """What is not as it must be."""
        found = Counter(self.wrong)
        told = [f"{count} x {text}" for text, count in found.most_common(10)]
        if self.different:
            told.append(f"{self.different} answers are not the offline engine's")
        if self.left and max(self.left) > LONGEST_LEAVE:
            told.append(f"a place was free only {max(self.left):.2f} s after its client had gone")
        if self.unseen > UNSEEN * (len(self.left) + self.unseen):
            told.append(f"{self.unseen} clients were not seen to leave")
        if self.growth() > GROWTH:
            told.append(f"memory grows by {self.growth():.1f} MiB a minute")
        return told


def conversations() -> list[list[dict[str, Any]]]:
    """Questions about no, one or two images, some in a second turn."""
    found = []
    for number in range(24):
        question = QUESTIONS[number % len(QUESTIONS)]
        urls = [image_url(100 * number + shown) for shown in range(number % 3)]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": question}] if parts else question
        messages = [{"role": "user", "content": content}]
        if number % 4 == 3:
            messages.append({"role": "assistant", "content": "red"})
            messages.append({"role": "user", "content": QUESTIONS[0]})
        found.append(messages)
    return found


def image_url(seed: int) -> str:
    """A smooth random image as JPEG."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((640, 480), Image.BICUBIC).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def bomb_url() -> str:
    """A PNG of a few bytes that says it is 30,000 x 30,000 pixels."""
    chunks = b""
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100_000))),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + name + data
        chunks += struct.pack(">I", zlib.crc32(name + data))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()


def bad_bodies() -> list[tuple[bytes, int]]:
    """Bodies that are no requests, or ask for what there is not, with their status."""

    def showing(url: str) -> dict[str, Any]:
        part = {"type": "image_url", "image_url": {"url": url}}
        return {"messages": [{"role": "user", "content": [part]}]}

    fine = {"messages": [{"role": "user", "content": "x"}]}
    requests = [
        fine | {"n": 2},
        fine | {"tools": [{"type": "function"}]},
        fine | {"temprature": 1},
        fine | {"temperature": -1},
        fine | {"max_tokens": 10**9},
        {"messages": []},
        {"messages": [{"role": "user", "content": "x" * 200_000}]},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        showing("data:image/png;base64,!!"),
        showing("data:image/png;base64," + base64.b64encode(b"<html>").decode()),
        showing(image_url(0)[:-2000]),
        showing(bomb_url()),
        showing("http://169.254.169.254/latest/meta-data/"),
        showing("file:///etc/passwd"),
    ]
    bodies = [(json.dumps(request).encode(), 400) for request in requests]
    bodies += [(body, 400) for body in (b"", b"{", b"\xff", b"[]", b"[" * 50_000)]
    return [*bodies, (json.dumps(fine | {"model": "no"}).encode(), 404)]


class Client(threading.Thread):
    """A client that asks one thing after another until the time is over."""

    leaving = threading.Lock()  # one at a time, so that the count of gone clients tells of it

    def __init__(self, seed: int, address: tuple[str, int], load: "Load"):
        super().__init__(daemon=True)
        self._random, self._address, self._load = random.Random(seed), address, load

    def run(self) -> None:
        kinds: dict[str, Callable[[], int]] = {
            "text": lambda: self._whole(self._load.texts),
            "images": lambda: self._whole(self._load.shown),
            "streamed": self._streamed,
            "left": self._leave,
            "bad": self._bad,
            "oversized": self._oversized,
        }
        names, weights = list(SHARES), list(SHARES.values())
        figures = self._load.figures
        while time.monotonic() < self._load.end:
            (kind,) = self._random.choices(names, weights)
            started = time.monotonic()
            try:
                figures.statuses[kind][kinds[kind]()] += 1
                figures.seconds[kind].append(time.monotonic() - started)
            except (OSError, http.client.HTTPException, ValueError) as error:
                figures.wrong.append(f"{kind}: {type(error).__name__}: {error}")

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self._address, timeout=120)

    def _post(self, body: bytes) -> tuple[int, bytes]:
        with closing(self._connection()) as connection:
            connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()

    def _body(self, case: Case, **fields: Any) -> bytes:
        given = {"messages": case.messages, "max_tokens": self._load.max_tokens, **fields}
        return json.dumps(given).encode()

    def _judge(self, case: Case, kind: str, status: int, text: str, tokens: int) -> None:
        figures = self._load.figures
        if status != 200:
            figures.wrong.append(f"{kind}: status {status}: {text[:100]}")
            return
        with figures.lock:
            figures.tokens += tokens
            figures.different += text != case.text

    def _whole(self, cases: Sequence[Case]) -> int:
        case = self._random.choice(cases)
        status, data = self._post(self._body(case))
        body = json.loads(data)
        good = status == 200
        text = body["choices"][0]["message"]["content"] if good else body["error"]["message"]
        tokens = body["usage"]["completion_tokens"] if good else 0
        self._judge(case, "whole", status, text, tokens)
        return status

    def _streamed(self) -> int:
        case = self._random.choice([*self._load.texts, *self._load.shown])
        options = {"stream": True, "stream_options": {"include_usage": True}}
        status, data = self._post(self._body(case, **options))
        *events, done, _ = data.decode().split("\n\n") if status == 200 else [data.decode(), "", ""]
        text, tokens = "", 0
        for event in events if status == 200 else ():
            body = json.loads(event.removeprefix("data: "))
            text += "".join(c["delta"].get("content") or "" for c in body["choices"])
            tokens = (body.get("usage") or {}).get("completion_tokens", tokens)
        if status == 200 and done != "data: [DONE]":
            self._load.figures.wrong.append("streamed: no [DONE]")
        self._judge(case, "streamed", status, text if status == 200 else data.decode(), tokens)
        return status

    def _leave(self) -> int:
        """Go in the middle of a request or of a long answer, and see how long its place is held."""
        with self.leaving:
            gone = self._load.gone()
            with closing(self._connection()) as connection:
                self._begin(connection)
            left = time.monotonic()
            while self._load.gone() == gone:
                if time.monotonic() - left > 5 * LONGEST_LEAVE:
                    self._load.figures.unseen += 1
                    return 200
                time.sleep(0.005)
            self._load.figures.left.append(time.monotonic() - left)
        return 499

    def _begin(self, connection: http.client.HTTPConnection) -> None:
        case = self._random.choice([*self._load.texts, *self._load.shown])
        way = self._random.choice(("half a body", "whole", "streamed"))
        longest = {"max_tokens": self._load.long, "min_tokens": self._load.long}
        body = self._body(case, stream=way == "streamed", **longest)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        sent = body[: len(body) // 2] if way == "half a body" else body
        connection.request("POST", PATH, sent, headers)
        if way == "streamed":
            connection.getresponse().readline()
        else:
            time.sleep(0.02)

    def _bad(self) -> int:
        body, wanted = self._random.choice(self._load.bad)
        status, data = self._post(body)
        if status != wanted or "message" not in json.loads(data)["error"]:
            self._load.figures.wrong.append(f"bad: {body[:80]!r} got status {status}")
        return status

    def _oversized(self) -> int:
        status, _ = self._post(bytes(MAX_BODY + 1))
        if status != 413:
            self._load.figures.wrong.append(f"oversized: status {status}")
        return status


class Load:
    """A load on a server for a while; `process` is the server's."""

    def __init__(
        self,
        address: tuple[str, int],
        process: psutil.Process,
        cases: Sequence[Case],
        *,
        max_tokens: int,
        long: int,
    ):
        self._address, self._process = address, process
        self.texts = [case for case in cases if not case.has_images]
        self.shown = [case for case in cases if case.has_images]
        self.bad, self.max_tokens, self.long = bad_bodies(), max_tokens, long
        self.figures, self.end = Figures(), 0.0

    def run(self, clients: int, seconds: float) -> Figures:
        """What so many clients saw."""
        started = time.monotonic()
        self.end = started + seconds
        threads = [Client(seed, self._address, self) for seed in range(clients)]
        for thread in threads:
            thread.start()
        while time.monotonic() < self.end and self._process.is_running():
            size = self._process.memory_info().rss / 2**20
            self.figures.memory.append((time.monotonic() - started, size))
            time.sleep(min(1.0, seconds / 20))
        for thread in threads:
            thread.join(150)
            if thread.is_alive():
                self.figures.wrong.append("a client hangs")
        if self._metric("owl2_requests_open"):
            self.figures.wrong.append("places are held when all clients are gone")
        return self.figures

    def gone(self) -> float:
        """How many clients were gone before their answer."""
        return self._metric('owl2_requests_total{status="499"}')

    def _metric(self, name: str) -> float:
        with closing(http.client.HTTPConnection(*self._address, timeout=60)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        found = re.search(f"^{re.escape(name)} (.+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


def table(figures: Figures, seconds: float) -> str:
    """The figures in Markdown."""
    lines = ["| requests | number | status | median s | 95 % s | max s |", "|" + "---|" * 6]
    for kind in SHARES:
        times = sorted(figures.seconds[kind])
        if not times:
            continue
        statuses = ", ".join(f"{s}: {n}" for s, n in sorted(figures.statuses[kind].items()))
        late = times[int(0.95 * (len(times) - 1))]
        lines.append(
            f"| {kind} | {len(times)} | {statuses} | {statistics.median(times):.3f} | {late:.3f} "
            f"| {times[-1]:.3f} |"
        )
    lines += ["", f"new tokens per second: {figures.tokens / seconds:.1f}"]
    if figures.left:
        middle, longest = statistics.median(figures.left), max(figures.left)
        lines.append(
            f"place free after its client left: median {middle:.3f} s, max {longest:.3f} s "
            f"({figures.unseen} were not seen to leave)"
        )
    if figures.memory:
        first, last = figures.memory[0][1], figures.memory[-1][1]
        lines.append(
            f"memory: {first:.0f} MiB at the start, {last:.0f} MiB at the end, "
            f"{figures.growth():+.2f} MiB a minute in the second half"
        )
    return "\n".join([*lines, f"answers other than the offline engine's: {figures.different}"])
