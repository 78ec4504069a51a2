"""A client of OpenAI-compatible servers that asks a judge, through httpx (the extra `judge`).

Replies are appended to a file as they come, so that a run that was stopped goes on where it was.
"""

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_owl2.errors import JudgeError, TaskError
from megatron_owl2.evaluation.judge_files import REPLY, unmarked
from megatron_owl2.evaluation.rows import read_rows, short
from megatron_owl2.utils.files import locked
from megatron_owl2.utils.json_text import is_json_list

if TYPE_CHECKING:
    import httpx

_LONGEST_WAIT = 60.0  # seconds between two tries
_MAY_PASS = {408, 409, 429}  # and all from 500 on: what another try may not meet


@dataclass(frozen=True)
class Server:
    """A server and how it is asked.

    `base_url` ends before `/chat/completions`, as `https://api.openai.com/v1`; `key` goes into the
    header, if there is one. At most `concurrency` requests are under way, each is tried `tries`
    times with waits from `pause` seconds on that double up to a minute, or as long as the
    server says.
    """

    base_url: str
    key: str | None = None
    concurrency: int = 8
    tries: int = 6
    timeout: float = 120.0
    pause: float = 1.0

    @property
    def shown(self) -> str:
        """The address for messages, without a password."""
        return re.sub("//[^/@]*@", "//", self.base_url)


def ask_all(requests: Mapping[str, dict[str, Any]], replies: Path, server: Server) -> int:
    """The number of new replies, to those of {custom_id: body} that have none in the file.

    Raises JudgeError for a server that refuses a request or cannot be reached and for replies to
    other requests, and TaskError for a file of replies that is damaged elsewhere than at its end,
    or if httpx is not installed; what was answered is in the file all the same.
    """
    try:
        import httpx
    except ImportError:
        raise TaskError("asking a judge needs httpx: pip install 'megatron-owl2[judge]'") from None
    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    replies.touch()
    try:
        with locked(replies), httpx.Client(headers=headers, timeout=server.timeout) as client:
            return _ask_missing(client, server, requests, replies)
    except BlockingIOError:
        raise JudgeError(f"another process is asking for {replies}; wait for it") from None


def _ask_missing(
    client: "httpx.Client", server: Server, requests: Mapping[str, dict], replies: Path
) -> int:
    answered = {unmarked(i): i for i in _answered(replies)}
    for i in requests:
        reply = answered.get(unmarked(i), i)
        if reply != i and unmarked(i) not in (i, reply):  # both have a mark
            raise JudgeError(
                f"{replies} holds the reply {reply}, to another answer, judge's model or prompt "
                f"than {i}; name another file"
            )
    left = {i: body for i, body in requests.items() if unmarked(i) not in answered}
    with (
        replies.open("a", encoding="utf-8") as file,
        tqdm(total=len(requests), initial=len(requests) - len(left), unit=" replies") as bar,
    ):
        for i, text in _answers(client, server, left):
            row = {"custom_id": i, "text": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()
    return len(left)


def _answers(
    client: "httpx.Client", server: Server, requests: Mapping[str, dict]
) -> Iterator[tuple[str, str]]:
    """(id, reply) as they come; an error is raised after the requests that were under way."""
    stop, failure = threading.Event(), None
    waiting, running = iter(requests.items()), set()
    with ThreadPoolExecutor(server.concurrency) as pool:
        try:
            while True:
                if failure is None:
                    for request in islice(waiting, server.concurrency - len(running)):
                        running.add(pool.submit(_ask, client, server, stop, *request))
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    try:
                        yield future.result()
                    except JudgeError as error:
                        failure = failure or error
                        stop.set()
        finally:
            stop.set()  # those that wait for another try
    if failure:
        raise failure


def _answered(replies: Path) -> set[str]:
    """The ids with a reply; a last line that was torn is cut off."""
    data = replies.read_bytes()
    if not data:
        return set()
    if is_json_list(data):
        raise JudgeError(f"{replies} holds a JSON list, which cannot be gone on with; name another")
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with replies.open("r+b") as file:
            if _is_object(data[end:]):
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            else:
                file.truncate(end)
    left = replies.stat().st_size
    return {row["custom_id"] for row in read_rows(replies, REPLY)} if left else set()


def _is_object(line: bytes) -> bool:
    """Whether a last line lacks its end only."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _ask(
    client: "httpx.Client", server: Server, stop: threading.Event, i: str, body: dict
) -> tuple[str, str]:
    """The id and the text of the reply."""
    import httpx

    delay, reason = 0.0, "it was stopped"
    for attempt in range(server.tries):
        if stop.wait(delay):
            break
        delay = min(server.pause * 2**attempt, _LONGEST_WAIT)
        try:
            answer = client.post(f"{server.base_url.rstrip('/')}/chat/completions", json=body)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise JudgeError(f"{server.shown} is no address of a server: {error}") from None
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            continue
        if answer.status_code == 200:
            return i, _text(answer, i)
        reason = f"status {answer.status_code}: {short(answer.text)}"
        if answer.status_code not in _MAY_PASS and answer.status_code < 500:
            raise JudgeError(f"{server.shown} refuses request {i}: {reason}")
        delay = _asked_to_wait(answer, delay)
    raise JudgeError(
        f"{server.shown} did not answer request {i} in {server.tries} tries: {reason}; start "
        "again to go on"
    )


def _asked_to_wait(answer: "httpx.Response", delay: float) -> float:
    """Seconds to wait: what the server says, at most a minute, else `delay`."""
    said = answer.headers.get("Retry-After", "")
    return min(float(said), _LONGEST_WAIT) if said.isdecimal() else delay


def _text(answer: "httpx.Response", i: str) -> str:
    try:
        text = answer.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        text = 0
    if text is None:  # a reply without a text, such as a refusal
        return ""
    if not isinstance(text, str):
        raise JudgeError(
            f"the answer to request {i} is no chat completion: {short(answer.text)}; is the "
            "address one of OpenAI's interface, as https://HOST/v1?"
        )
    return text.encode(errors="replace").decode()  # JSON can say a half of a surrogate pair
