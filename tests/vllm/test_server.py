"""vLLM's OpenAI server with the plugin: chats and completions have the engine's ids."""

import json
import subprocess
import sys
import time

import pytest

pytest.importorskip("vllm")

import httpx
from vllm_cases import CASES, REFERENCE, as_openai

ASKED = {"temperature": 0, "max_tokens": 12, "min_tokens": 12, "return_token_ids": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A client of a server behind a socket of the file system, which no other program can have."""
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(REFERENCE / "model"), "--served-model-name", "owl2"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    command += ["--distributed-executor-backend", "uni", "--uds", str(folder / "socket")]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
        httpx.Client(
            transport=httpx.HTTPTransport(uds=str(folder / "socket")),
            base_url="http://server",
            timeout=120,
        ) as client,
    ):
        try:
            wait_for(client, process, folder / "log")
            yield client
        finally:
            process.terminate()


def wait_for(client, process, log) -> None:
    while True:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)


@pytest.mark.parametrize("number", [i for i, case in enumerate(CASES) if "messages" in case])
def test_a_chat_has_the_engines_ids(server, number):
    case = CASES[number]
    messages = [as_openai(message) for message in case["messages"]]
    reply = server.post("/v1/chat/completions", json={"messages": messages, **ASKED})
    assert reply.status_code == 200, reply.text
    assert reply.json()["prompt_token_ids"] == case["prompt_ids"]
    assert reply.json()["choices"][0]["token_ids"] == case["ids"]


def test_a_completion_is_a_plain_string(server):
    case = CASES[1]
    reply = server.post("/v1/completions", json={"prompt": case["prompt"], **ASKED}).json()
    assert reply["choices"][0]["prompt_token_ids"] == case["prompt_ids"]
    assert reply["choices"][0]["token_ids"] == case["ids"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "no"}}]}],
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_what_is_no_conversation_is_refused_and_the_server_lives(server, messages):
    content = json.dumps({"messages": messages, **ASKED})
    headers = {"Content-Type": "application/json"}
    reply = server.post("/v1/chat/completions", content=content, headers=headers)
    assert reply.status_code == 400, reply.text
    reply = server.post("/v1/completions", json={"prompt": "a <|image|>", **ASKED})
    assert reply.status_code == 400, reply.text
    assert server.get("/health").status_code == 200
