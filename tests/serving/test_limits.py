"""Places, deadlines and sizes of requests; clients that leave; the end of a server."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable

import pytest
from processes import wait_until
from serving import Running, SlowScheduler, asked, image_url, running, tiny_model

from megatron_owl2.errors import ServingError
from megatron_owl2.serving import server
from megatron_owl2.serving.limits import Limits

LONG = {"max_tokens": 400, "min_tokens": 400}
SLOW = 0.1  # seconds of a step: a long answer takes 40
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("serving"))


@contextlib.contextmanager
def slow_server(loaded, seconds=SLOW, **limits):
    limits = Limits(**{"max_batch": 1, "max_queue": 1, "grace_seconds": 0.2, **limits})
    scheduler = SlowScheduler(loaded, seconds, limits.max_batch)
    with running(loaded, limits, scheduler=scheduler) as found:
        yield found


def begun(found: Running, **fields) -> http.client.HTTPConnection:
    """A connection that has sent a request with a long answer."""
    body = {"messages": asked("badal", image_url(1)), **LONG, **fields}
    connection = found.connection()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", PATH, json.dumps(body), headers)
    return connection


def together(*calls: Callable) -> list:
    """The results of calls in threads of their own."""
    results: list = [None] * len(calls)

    def call(number: int) -> None:
        results[number] = calls[number]()

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_clients_that_leave_free_their_places(loaded):
    with slow_server(loaded) as found:
        engine, metric = found.service.engine, found.metric
        for stream in (False, True):
            active = begun(found, stream=stream)
            if stream:  # it leaves in the middle
                assert b"assistant" in active.getresponse().readline()
            wait_until(lambda: engine.active == 1)
            queued = begun(found)
            wait_until(lambda: engine.waiting == 1)
            assert metric("owl2_requests_open") == 2
            assert metric("owl2_requests_active") == metric("owl2_requests_queued") == 1
            queued.close()
            wait_until(lambda: engine.waiting == 0, 20)
            active.close()
            wait_until(lambda: engine.active == 0, 20)
            wait_until(lambda: metric("owl2_requests_open") == 0, 20)
        assert metric('owl2_requests_total{status="499"}') == 4
        sending = socket.create_connection((found.host, found.port))
        sending.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{".encode())
        wait_until(lambda: metric("owl2_requests_open") == 1)
        sending.close()
        wait_until(lambda: metric("owl2_requests_open") == 0, 20)
        assert found.chat("badal", max_tokens=1).status == 200


def test_a_full_server_says_when_to_ask_again(loaded):
    with slow_server(loaded) as found:
        with contextlib.closing(begun(found)), contextlib.closing(begun(found)):
            wait_until(lambda: found.metric("owl2_requests_open") == 2)
            reply = found.chat("badal")
            assert reply.status == 429 and reply.headers["retry-after"] == "1"
            assert reply.error["type"] == "rate_limit_error" and reply.error["code"] == "queue_full"
        wait_until(lambda: found.metric("owl2_requests_open") == 0)
        assert found.chat("badal", max_tokens=1).status == 200


def test_large_and_slow_bodies_are_refused(loaded):
    with slow_server(loaded, max_body=100_000) as found:
        large = found.request("POST", PATH, b" " * 300_000)
        assert large.status == 413 and "100000 bytes" in large.error["message"]
        assert large.headers["connection"] == "close"
        with contextlib.closing(found.connection()) as connection:  # without saying how large
            pieces = (b" " * 50_000 for _ in range(5))
            connection.request("POST", PATH, pieces, encode_chunked=True)
            assert connection.getresponse().status == 413
        with contextlib.closing(socket.create_connection((found.host, found.port))) as raw:
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n"
            raw.sendall((head % (10**12, "Expect: 100-continue\r\n")).encode())
            assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
        assert found.chat("badal", max_tokens=1).status == 200
    with (
        slow_server(loaded, body_seconds=0.2) as found,
        contextlib.closing(socket.create_connection((found.host, found.port))) as raw,
    ):
        raw.sendall((head % (10, "")).encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 408 ")


def test_requests_end_at_their_deadline(loaded):
    with slow_server(loaded, max_batch=2, request_seconds=1.0) as found:
        whole, stream = together(
            lambda: found.chat("badal", **LONG), lambda: found.chat("badal", stream=True, **LONG)
        )
        assert whole.status == 504 and whole.error["code"] == "deadline_exceeded"
        if stream.status == 504:  # a machine so busy that no token came in time
            assert stream.error["code"] == "deadline_exceeded"
        else:
            *_, error, done, _ = stream.data.decode().split("\n\n")
            assert stream.status == 200 and done == "data: [DONE]"
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        wait_until(lambda: found.service.engine.active == 0, 20)


def test_a_server_that_ends_lets_requests_end(loaded):
    with slow_server(loaded, 0.01, max_batch=2, grace_seconds=60) as found:
        whole = begun(found, max_tokens=30, min_tokens=30)
        stream = begun(found, max_tokens=30, min_tokens=30, stream=True)
        wait_until(lambda: found.service.engine.active == 2)
        ended = threading.Thread(target=found.end)
        ended.start()
        body = json.loads(whole.getresponse().read())
        assert body["usage"]["completion_tokens"] == 30
        assert stream.getresponse().read().endswith(b"data: [DONE]\n\n")
        ended.join(60)
        with pytest.raises(ConnectionError):
            found.chat("badal")


def test_what_has_not_ended_in_time_is_told_why(loaded):
    with slow_server(loaded, max_batch=2) as found:
        whole, stream = begun(found), begun(found, stream=True)
        first = stream.getresponse()
        assert b"assistant" in first.readline()
        wait_until(lambda: found.service.engine.active == 2)
        found.end()
        reply = whole.getresponse()
        assert reply.status == 503
        assert json.loads(reply.read())["error"]["code"] == "shutting_down"
        assert b'"code": "shutting_down"' in first.read()
    assert not found.failure


def test_a_failed_engine_ends_all(loaded):
    with slow_server(loaded, max_batch=2) as found:
        assert found.request("GET", "/health").status == 200
        whole, stream = begun(found), begun(found, stream=True)
        first = stream.getresponse()
        wait_until(lambda: found.service.engine.active == 2)
        found.service.engine._scheduler.fault = RuntimeError("no memory")
        reply = whole.getresponse()
        assert reply.status == 500
        assert json.loads(reply.read())["error"]["code"] == "engine_error"
        assert b'"code": "engine_error"' in first.read()
        found.thread.join(60)
        assert "the engine failed" in found.service.why_unhealthy()
    with pytest.raises(ServingError, match="the engine failed: RuntimeError: no memory"):
        raise found.failure[0]


def test_an_address_that_is_taken_is_refused():
    with server.listen("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(ServingError, match="choose another --host or --port"):
            server.listen("127.0.0.1", bound.getsockname()[1])
    for host, port in (("127.0.0.1", 10**6), ("no.such.host.invalid", 80)):
        with pytest.raises(ServingError, match="cannot be listened on"):
            server.listen(host, port)
