"""The server's page in a real browser, where tests/serving/install.sh has installed one."""

import json
from pathlib import Path

import browser
import numpy as np
import pytest
from PIL import Image
from processes import wait_until
from serving import SlowScheduler, asked, offline, running, tiny_model
from tiny_data import make_image

from megatron_owl2.serving.limits import Limits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.PROGRAM is None, reason="there is no Chromium"),
]

MARKUP = "<img src=x onerror='window.hacked = 1'>"
LIMITS = Limits(max_images=3, max_tokens=300)
ANSWERED = "!document.querySelector('#send').hidden && document.querySelectorAll('.bubble').length"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def scheduler(loaded):
    return SlowScheduler(loaded)


@pytest.fixture(scope="module")
def tab(loaded, scheduler):
    with (
        running(loaded, LIMITS, name=f"tiny {MARKUP}", scheduler=scheduler) as server,
        browser.page() as page,
    ):
        page.resize(1000, 760)
        page.url = server.url + "/"
        yield page


@pytest.fixture
def page(tab):
    """The page, opened anew, with `sent`, the bodies of its requests."""
    tab.open("about:blank")
    tab.console.clear()
    tab.open(tab.url)
    tab.wait("document.querySelector('#model').textContent.startsWith('tiny')")
    tab.evaluate(
        "window.sent = []; window.realFetch = window.fetch;"
        "window.fetch = (url, options) => { sent.push(JSON.parse(options.body));"
        " return realFetch(url, options); }; 0"
    )
    return tab


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("images") / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        make_image(number).save(path)
    return paths


def ask(page, question: str, bubbles: int) -> str:
    """The answer to a question, when so many messages are there."""
    page.type("#text", question)
    page.click("#send")
    page.wait(f"{ANSWERED} === {bubbles}")
    return page.evaluate("[...document.querySelectorAll('.bubble')].at(-1).textContent")


def test_a_conversation_with_images(page, loaded, files):
    page.choose_files("#files", *files)
    page.wait("document.querySelectorAll('#pending img').length === 2")
    first = ask(page, "badal <b>bamer</b>", 2)
    second = ask(page, "kunat", 4)
    one, two = (sent["messages"] for sent in page.evaluate("sent"))
    urls = [part["image_url"]["url"] for part in one[0]["content"][:2]]
    assert one == asked("badal <b>bamer</b>", *urls) and urls[0] != urls[1]
    assert two == [
        *one,
        {"role": "assistant", "content": first},
        {"role": "user", "content": "kunat"},
    ]
    for messages, answer in ((one, first), (two, second)):
        wanted = offline(loaded, messages, max_new_tokens=LIMITS.max_tokens)
        shown = page.evaluate(
            f"(() => {{ const p = document.createElement('p');"
            f" p.textContent = {json.dumps(wanted.text)}; return p.textContent; }})()"
        )
        assert answer == shown and answer.strip()
    assert page.evaluate("document.querySelectorAll('.user .images img').length") == 2
    assert page.evaluate("document.querySelectorAll('#pending li').length") == 0
    assert page.text(".user .bubble") == "badal <b>bamer</b>"
    page.click("#clear")
    assert page.evaluate("document.querySelectorAll('.turn').length") == 0
    ask(page, "kunat", 2)
    assert page.evaluate("sent.at(-1).messages.length") == 1
    assert page.console == []


def test_an_answer_is_streamed_and_can_be_stopped(page, scheduler):
    scheduler.seconds = 0.1
    try:
        page.evaluate(
            "window.fetch = (u, o) => realFetch(u, {...o, body: JSON.stringify({"
            "...JSON.parse(o.body), min_tokens: 300})}); 0"
        )
        page.type("#text", "badal")
        page.click("#send")
        growing = "document.querySelector('.assistant .bubble').textContent.length"
        seen = page.wait(f"document.querySelector('.assistant') && {growing}")
        page.wait(f"{growing} > {seen}")
        assert scheduler.active == 1 and page.evaluate("document.querySelector('#send').hidden")
        page.click("#stop")
        page.wait("document.querySelector('.note')?.textContent === 'stopped'")
        wait_until(lambda: scheduler.active == 0, 20)
        page.type("#text", "again")
        page.click("#send")
        page.wait(f"document.querySelectorAll('.assistant').length === 2 && {growing}")
        page.click("#clear")  # in the middle of an answer
        wait_until(lambda: scheduler.active == 0, 20)
        assert page.evaluate("document.querySelectorAll('.turn').length") == 0
        assert page.text("#error") == ""
    finally:
        scheduler.seconds = 0


def test_errors_are_shown_and_nothing_is_lost(page, files, tmp_path):
    long = "x" * 700
    page.choose_files("#files", files[0])
    page.wait("document.querySelectorAll('#pending img').length === 1")
    ask(page, long, 2)
    assert "the limit is 512" in page.text("#error")
    assert page.evaluate("document.querySelector('#text').value") == long
    assert page.evaluate("document.querySelectorAll('#pending img').length") == 1
    page.evaluate("document.querySelector('#text').value = ''")
    ask(page, "badal", 4)
    assert page.evaluate("document.querySelector('#error').hidden")
    assert page.evaluate("sent.at(-1).messages.length") == 1  # what failed is no part of it
    (tmp_path / "note.txt").write_text("no image")
    page.choose_files("#files", tmp_path / "note.txt")
    page.wait("document.querySelector('#error').textContent === 'note.txt is not an image'")
    page.choose_files("#files", *files, files[0])
    page.wait("document.querySelector('#error').textContent.includes('at most 3 images')")
    page.click("#pending button")
    page.wait("document.querySelectorAll('#pending img').length === 1")
    page.evaluate("window.fetch = async () => { throw new TypeError('x'); }; 0")
    ask(page, "badal", 6)
    assert page.text("#error") == "The server cannot be reached"


def test_text_stays_text(page):
    events = [
        {"choices": [{"delta": {"content": MARKUP}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": "length"}]},
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.evaluate(f"window.fetch = async () => new Response({json.dumps(stream)}); 0")
    assert ask(page, MARKUP, 2) == MARKUP
    assert page.text(".user .bubble") == MARKUP and page.text("#model") == f"tiny {MARKUP}"
    assert page.text(".note") == "cut at the longest answer"
    failure = json.dumps({"error": {"message": MARKUP}})
    page.evaluate(
        f"window.fetch = async () => new Response({json.dumps(failure)}, {{status: 400}}); 0"
    )
    ask(page, "x", 4)
    assert page.text("#error") == MARKUP
    page.evaluate(  # nor would a hole in the page run anything
        "(() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        " document.body.append(s); document.body.insertAdjacentHTML('beforeend',"
        f" {json.dumps(MARKUP)}); }})()"
    )
    page.wait("document.querySelector('body > img').complete")
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in page.console)


def test_images_are_pasted_and_dropped_and_large_ones_redrawn(page, tmp_path):
    for kind, event, field in (
        ("paste", "ClipboardEvent", "clipboardData"),
        ("drop", "DragEvent", "dataTransfer"),
    ):
        page.evaluate(
            "(async () => { const canvas = document.createElement('canvas');"
            " const blob = await new Promise((done) => canvas.toBlob(done));"
            " const data = new DataTransfer(); data.items.add(new File([blob], 'a.png',"
            " {type: 'image/png'})); document.body.dispatchEvent(new "
            f"{event}('{kind}', {{{field}: data, bubbles: true, cancelable: true}})); }})()"
        )
        wanted = 1 if kind == "paste" else 2
        page.wait(f"document.querySelectorAll('#pending img').length === {wanted}")
    noise = np.random.default_rng(0).integers(0, 255, (300, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 1 << 20
    page.choose_files("#files", tmp_path / "large.png")
    page.wait("document.querySelectorAll('#pending img').length === 3")
    last = "[...document.querySelectorAll('#pending img')].at(-1)"
    assert page.evaluate(f"{last}.src.slice(0, 15)") == "data:image/jpeg"
    page.wait(f"{last}.naturalWidth === 1600 && {last}.naturalHeight === 240")


def test_settings_go_with_the_request(page):
    ask(page, "badal", 2)
    page.click("#settings-button")
    page.evaluate(
        "(() => { const t = document.querySelector('#temperature'); t.value = 0.7;"
        " t.dispatchEvent(new Event('input')); })()"
    )
    page.type("#max-tokens", "5")
    assert page.text("#temperature-value") == "0.7"
    ask(page, "badal", 4)
    plain, set_ = page.evaluate("sent")
    assert (plain["temperature"], plain["max_tokens"]) == (0, None)
    assert (set_["temperature"], set_["max_tokens"]) == (0.7, 5)


def test_controls_have_names_and_fit_a_phone(page):
    page.click("#settings-button")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if node.get("role", {}).get("value") in ("button", "textbox", "slider", "spinbutton")
    ]
    assert len(controls) >= 7 and all(name for _, name in controls), controls
    assert ("textbox", "Message") in controls and ("button", "Send") in controls
    page.resize(360, 640, mobile=True)
    try:
        ask(page, "badal " * 20, 2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for selector in ("#send", "#text", "label.attach", "#clear", "#settings-button"):
            left, top, right, bottom = page.evaluate(
                f"(() => {{ const r = document.querySelector('{selector}').getBoundingClientRect();"
                " return [r.left, r.top, r.right, r.bottom]; })()"
            )
            assert 0 <= left < right <= 360 and 0 <= top < bottom <= 640, selector
            assert bottom - top >= 44, selector  # a finger's size
    finally:
        page.resize(1000, 760)
