"""Chromium without a window, driven over two pipes by its own DevTools protocol."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
_OPTIONS = [
    "--headless",
    "--no-sandbox",  # containers run tests as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-pipe",  # file descriptors 3 and 4
]


class Page:
    """A tab: calls of the protocol, and what it told on the console."""

    def __init__(self, process: subprocess.Popen, to_browser: int, from_browser: int):
        self._process, self._to, self._from = process, to_browser, from_browser
        self._numbers, self._buffer = itertools.count(1), b""
        self._session: str | None = None
        self.console: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict:
        """The result of a call; raises RuntimeError with the browser's error."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            if answer.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.console.append(json.dumps(answer["params"]))

    def _next(self, seconds: float = 60) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], seconds)
            piece = os.read(self._from, 1 << 20) if ready else b""
            if not piece:
                raise RuntimeError(f"the browser does not answer (exit {self._process.poll()})")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Go to an address and wait for the page to be there."""
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({url!r})")

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; raises RuntimeError for its exception."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> Any:
        """The first true value of an expression."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(condition)):
            assert time.monotonic() < deadline, f"{condition} is not true after {seconds} s"
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        """The text of an element."""
        return self.evaluate(f"document.querySelector({selector!r}).textContent")

    def click(self, selector: str) -> None:
        """A click on an element where it lies, as of a mouse."""
        x, y = self.evaluate(
            f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Text into a field, as of a keyboard."""
        self.evaluate(f"document.querySelector({selector!r}).focus()")
        self.call("Input.insertText", text=text)

    def choose_files(self, selector: str, *files: Path) -> None:
        """Files for a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        """A window of another size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    def screenshot(self, path: Path) -> None:
        """The page as PNG."""
        shot = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(shot))


@contextmanager
def page() -> Iterator[Page]:
    """A tab of a new browser, which ends with the block."""
    assert PROGRAM, "there is no Chromium"
    commands, events = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        script = f'exec "$@" 3<&{commands[0]} 4>&{events[1]}'
        browser = [PROGRAM, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            ["bash", "-c", script, "browser", *browser],
            pass_fds=(commands[0], events[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands[0])
        os.close(events[1])
        try:
            yield Page(process, commands[1], events[0])
        finally:
            os.close(commands[1])
            os.close(events[0])
            process.terminate()
            process.wait(30)
