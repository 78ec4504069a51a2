"""Client of a judge's server: what it asks again, what it keeps, and what it says of failures."""

import json
import threading

import pytest
from judge_server import BODY, judge, reply, rows_of

from megatron_owl2.errors import JudgeError
from megatron_owl2.evaluation import judge_client
from megatron_owl2.evaluation.judge_client import Server, ask_all
from megatron_owl2.utils.files import locked


def test_a_client_tries_again_and_goes_on(tmp_path):
    path = tmp_path / "replies.jsonl"
    old = json.dumps(reply("1.1.a", "old \u2028 \x85"), ensure_ascii=False)
    path.write_text(old + '\n{"custom_id": "1.1.b", "te', encoding="utf-8")
    requests = {f"1.1.{i}": BODY for i in "abcde"}
    with judge(lambda body, number: [429, 503, "fine", "\ud800"][min(number - 1, 3)]) as (
        url,
        asked,
    ):
        server = Server(url, concurrency=1, pause=0.01)
        assert ask_all(requests, path, server) == 4
    assert len(asked) == 6 and asked[0][2] is None
    assert rows_of(path) == [
        reply("1.1.a", "old \u2028 \x85"),
        reply("1.1.b", "fine"),
        *(reply(f"1.1.{i}", "?") for i in "cde"),
    ]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([400], "refuses request 1.1.b: status 400"),
        ([500] * 9, "did not answer request 1.1.b in 3 tries: status 500"),
        (
            [{"choices": []}],
            r"the answer to request 1.1.b is no chat completion: {\"choices\": \[\]}",
        ),
    ],
)
def test_a_server_that_fails_is_named_and_what_it_said_is_kept(tmp_path, answers, message):
    path = tmp_path / "replies.jsonl"
    requests = {f"1.1.{i}": BODY for i in "abc"}
    with (
        judge(lambda body, number: ["fine", *answers][number - 1]) as (url, _),
        pytest.raises(JudgeError, match=message),
    ):
        ask_all(requests, path, Server(url, None, 1, tries=3, pause=0.01))
    assert rows_of(path) == [reply("1.1.a", "fine")]


def test_replies_that_are_whole_are_kept(tmp_path):
    path, server = tmp_path / "replies.jsonl", Server("http://me:secret@127.0.0.1:9", tries=1)
    path.write_text(json.dumps(reply("1.1.a", "old")))  # lacks its line feed only
    assert ask_all({"1.1.a": BODY}, path, server) == 0
    assert rows_of(path) == [reply("1.1.a", "old")]
    path.write_text(json.dumps([reply("1.1.a", "old")]))
    with pytest.raises(JudgeError, match="a JSON list"):
        ask_all({"1.1.b": BODY}, path, server)
    assert json.loads(path.read_text()) == [reply("1.1.a", "old")]
    path.unlink()
    with pytest.raises(JudgeError, match="http://127.0.0.1:9 did not answer"):
        ask_all({"1.1.b": BODY}, path, server)
    with locked(path), pytest.raises(JudgeError, match="another process is asking"):
        ask_all({"1.1.b": BODY}, path, server)


def test_without_a_server_the_address_is_named(tmp_path):
    with judge(lambda body, number: "x") as (url, _):
        pass
    for address, reason in (
        (url, "did not answer request 1.1.a in 2 tries"),
        ("localhost", "is no address of a server"),
        ("ftp://localhost", "is no address of a server"),
    ):
        with pytest.raises(JudgeError, match=f"{address} {reason}"):
            ask_all({"1.1.a": BODY}, tmp_path / "r.jsonl", Server(address, tries=2, pause=0.01))


def test_as_many_requests_are_under_way_as_are_allowed(tmp_path):
    together, lock, counts = threading.Barrier(3, timeout=30), threading.Lock(), [0, 0]

    class Together:
        """A client whose requests go on when three are under way."""

        def post(self, url, json):
            with lock:
                counts[0] += 1
                counts[1] = max(counts)
            together.wait()
            with lock:
                counts[0] -= 1
            return type("Answer", (), {"status_code": 200, "json": lambda self: said, "text": ""})()

    said = {"choices": [{"message": {"content": None}}]}
    requests = {f"1.1.{i}": BODY for i in range(9)}
    server = Server("http://x", concurrency=3)
    found = list(judge_client._answers(Together(), server, requests))
    assert sorted(found) == [(i, "") for i in sorted(requests)]  # a refusal has no text
    assert counts == [0, 3]
