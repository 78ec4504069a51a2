"""The chat API as OpenAI's client uses it: answers of the offline engine, streams, and errors."""

import json
import threading

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import asked, image_url, offline, running, tiny_model

from megatron_owl2.serving.limits import Limits
from megatron_owl2.serving.responses import Stripped

LIMITS = Limits(max_tokens=40, max_images=3, max_image_bytes=20_000, max_image_pixels=10_000)
DIALOGUE = [
    {"role": "system", "content": "kunat"},
    *asked("badal", image_url(1)),
    {"role": "assistant", "content": "bamer</s>"},
    *asked("<|image|> dinap", image_url(2, "JPEG"), image_url(1)),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def server(loaded):
    with running(loaded, LIMITS) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_answers_are_those_of_the_offline_engine(loaded, client):
    seen = set()
    for messages in (
        [{"role": "user", "content": "badal"}],
        asked("kunat", image_url(3)),
        asked("kunat", image_url(4)),
        DIALOGUE,
    ):
        wanted = offline(loaded, messages, max_new_tokens=24, min_new_tokens=5, logprobs=True)
        found = client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_completion_tokens=24,
            logprobs=True,
            extra_body={"min_tokens": 5},
        )
        (choice,) = found.choices
        assert choice.message.content == wanted.text and choice.message.role == "assistant"
        assert choice.finish_reason == wanted.finish_reason
        assert found.usage.prompt_tokens == wanted.prompt_positions
        assert found.usage.completion_tokens == len(wanted.token_ids)
        assert found.usage.total_tokens == found.usage.prompt_tokens + len(wanted.token_ids)
        logprobs = [token.logprob for token in choice.logprobs.content]
        assert logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        data = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
        # What bytes that make no character become differs.
        assert data.decode(errors="ignore").strip() == wanted.text.replace("\ufffd", "")
        seen.add(wanted.text)
    assert len(seen) == 4


def test_streams_have_the_same_text_and_usage(loaded, client):
    wanted = offline(loaded, DIALOGUE, max_new_tokens=24, min_new_tokens=12)
    options = {"model": "tiny", "messages": DIALOGUE, "max_tokens": 24, "stream": True}
    more = {"min_tokens": 12}
    chunks = list(client.chat.completions.create(**options, extra_body=more))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted.text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [wanted.finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 8
    options["stream_options"] = {"include_usage": True}
    *_, last = client.chat.completions.create(**options, extra_body=more)
    assert last.choices == [] and last.usage.completion_tokens == len(wanted.token_ids)


def test_questions_that_come_together_are_answered_as_alone(loaded, server):
    questions = [asked(f"badal {n}", *[image_url(n)] * (n % 2)) for n in range(12)]
    found = {}

    def ask(n: int) -> None:
        found[n] = server.chat(questions[n], max_tokens=10 + n).text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = [offline(loaded, q, max_new_tokens=10 + n).text for n, q in enumerate(questions)]
    assert [found[n] for n in range(len(questions))] == wanted


@given(st.lists(st.text(st.sampled_from("ab \n\t"), max_size=4)))
def test_text_in_pieces_is_stripped_as_a_whole(pieces):
    stripped = Stripped()
    assert "".join(map(stripped.push, pieces)) == "".join(pieces).strip()


def test_sampling_follows_the_seed(loaded, server):
    options = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    texts = [
        server.chat("badal", max_tokens=20, min_tokens=20, seed=seed, **options).text
        for seed in (1, 1, 2, None, None)
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 4
    wanted = offline(
        loaded,
        [{"role": "user", "content": "badal"}],
        max_new_tokens=20,
        min_new_tokens=20,
        seed=1,
        **options,
    )
    assert texts[0] == wanted.text


def test_stop_strings_end_an_answer_before_them(loaded, server):
    whole = server.chat("badal", max_tokens=30, min_tokens=30).text
    stop = whole[8:10]
    reply = server.chat("badal", max_tokens=30, min_tokens=30, stop=stop)
    assert reply.text == whole[: whole.index(stop)]
    assert reply.json["choices"][0]["finish_reason"] == "stop"


def test_without_a_number_of_tokens_an_answer_has_what_fits(server):
    reply = server.chat("badal", min_tokens=40)
    assert reply.json["usage"]["completion_tokens"] == LIMITS.max_tokens
    assert reply.json["choices"][0]["finish_reason"] == "length"


def test_clients_send_messages_back_as_they_got_them(client, server):
    first = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "badal"}], max_tokens=8
    )
    said = first.choices[0].message
    said.content = said.content or "x"
    again = [{"role": "user", "content": "badal"}, said, {"role": "user", "content": "kunat"}]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=4).choices
    neutral = {"n": 1, "tools": [], "response_format": {"type": "text"}, "user": "me", "top_k": -1}
    assert server.chat("badal", max_tokens=2, **neutral, presence_penalty=0).status == 200


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"model": "gpt"}, 404, "model", "there is no model 'gpt'"),
        ({"n": 2}, 400, "n", "n is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "not supported"),
        ({"temprature": 1}, 400, "temprature", "did you mean 'temperature'?"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, 400, "temperature", "valid number"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1e3}, 400, "max_tokens", "valid integer"),
        ({"max_tokens": 41}, 400, "max_tokens", "at most 40"),
        ({"max_tokens": 3, "min_tokens": 4}, 400, "min_tokens", "at most 3"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({"stop": ""}, 400, "stop.0", "at least 1 character"),
        ({"stream_options": {}}, 400, "stream_options", "need stream"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": "x"}] * 5000}, 400, "messages", "at most 4096"),
        ({"metadata": [[]] * 40_000}, 400, None, "more than 65536 values"),
        ({"messages": "hi"}, 400, "messages", "valid list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", "role"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages", "is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, 400, None, "'image_url'"),
        ({"messages": asked("x" * 600)}, 400, "messages", "limit is 512"),
        ({"messages": asked("x" * 40_000)}, 400, "messages", "more than 512 positions"),
        ({"messages": asked("x" * 480), "max_tokens": 40}, 400, "messages", "ask for at most"),
        ({"messages": asked("x", *[image_url(1)] * 4)}, 400, "messages", "at most 3"),
        ({"messages": asked("x", "http://example.com/a.png")}, 400, "messages", "data URLs"),
        ({"messages": asked("x", "file:///etc/passwd")}, 400, "messages", "data URLs"),
        ({"messages": asked("x", "data:image/png,abc")}, 400, "messages", "base64"),
        ({"messages": asked("x", "data:image/png;base64,a$b")}, 400, "messages", "not base64"),
        ({"messages": asked("x", "data:image/png;base64,")}, 400, "messages", "file is empty"),
        ({"messages": asked("x", image_url(1)[:-40])}, 400, "messages", "cannot be used"),
        ({"messages": asked("x", image_url(1, width=200))}, 200, None, ""),
        ({"messages": asked("x", image_url(1, width=400))}, 400, "messages", "400 x 30 pixels"),
        ({"messages": asked("x", image_url(1) + "A" * 30_000)}, 400, "messages", "20000 bytes"),
    ],
)
def test_what_is_wrong_is_told_in_openais_form(server, fields, status, param, message):
    body = {"messages": [{"role": "user", "content": "x"}]} | {"max_tokens": 2} | fields
    reply = server.request("POST", "/v1/chat/completions", body)
    assert reply.status == status
    if status != 200:
        error = reply.error
        assert error["type"] == "invalid_request_error" and message in error["message"]
        assert param is None or error["param"] == param


def test_bodies_that_are_no_requests_are_refused(server):
    post = ("POST", "/v1/chat/completions")
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for body in (b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"n": NaN}', b"[" * 100_000):
        assert "body" in server.request(*post, body).error["message"]
    surrogate = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    assert server.request(*post, surrogate).status == 400
    plain = server.request(*post, chat, **{"Content-Type": "text/plain"})
    assert plain.status == 415 and "application/json" in plain.error["message"]
    assert server.request("GET", "/v1/chat/completions").status == 405
    assert server.request("GET", "/nothing").error["message"] == "GET /nothing: Not Found"


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.BadRequestError, match="n is not supported") as caught:
        client.chat.completions.create(model="tiny", messages=asked("x"), n=2)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=asked("x"))
    with pytest.raises(openai.BadRequestError, match="is empty"):
        client.chat.completions.create(model="tiny", messages=asked(" "), stream=True)


def test_models_health_and_metrics(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert server.request("GET", "/health").json == {"status": "ok"}
    names = {
        'owl2_requests_total{status="200"}': 1,
        "owl2_prompt_tokens_total": 20,
        "owl2_new_tokens_total": 7,
        "owl2_time_to_first_token_seconds_count": 1,
        "owl2_time_per_token_seconds_count": 1,
    }
    before = {name: server.metric(name) for name in names}
    bad = server.metric('owl2_requests_total{status="400"}')
    reply = server.chat("badal", max_tokens=7, min_tokens=7)
    names["owl2_prompt_tokens_total"] = reply.json["usage"]["prompt_tokens"]
    server.chat("badal", n=2)
    assert {name: server.metric(name) - before[name] for name in names} == names
    assert server.metric('owl2_requests_total{status="400"}') == bad + 1
    for name in ("owl2_requests_active", "owl2_requests_queued", "owl2_requests_open"):
        assert server.metric(name) == 0
    assert json.dumps(server.request("GET", "/limits").json)
