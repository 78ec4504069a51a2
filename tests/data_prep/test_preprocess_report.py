"""Corpus report of preprocessing: counts, histograms, and the page to look at."""

import base64
import re
from html.parser import HTMLParser

import pytest
from preprocess_run import job, pair, pairs, report
from tiny_data import encoded, make_image

from data_prep.corpus_statistics import histogram_edges
from data_prep.filters import Filters
from data_prep.splits import Skipped
from megatron_owl2.data.images import image_size
from megatron_owl2.data.shards.records import Record, Turn

VOID = {"meta", "img", "rect", "line"}
HOSTILE = "<script>alert('1')</script>\"&amp; \ud800"


class Page(HTMLParser):
    """A page whose elements are all closed in order; keeps elements and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def page(folder) -> Page:
    return Page((folder / "report.html").read_text())


def test_the_report_adds_up_over_splits(tmp_path):
    contents = [
        [pair("a", caption="1234"), pair("b", caption="12345"), Skipped("no image", "row 3")],
        [pair("c", caption="x" * 5000), Skipped("no image", "row 9"), Skipped("odd", "row 10")],
        [Record("text", caption="123")],
    ]
    outcome = job(contents, tmp_path, filters=Filters(max_caption=4999))
    found = report(tmp_path)
    assert (found["kept"], found["shards"]) == (3, 2)
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert list(found["skipped"].items()) == [
        ("no image", 2),
        ("caption above 4999 characters", 1),
        ("odd", 1),
    ]
    assert found["examples"]["no image"] == ["row 3", "row 9"]
    assert str(outcome.report).startswith("kept 3, skipped 4\n  2 x no image (such as row 3)")
    text = found["histograms"]["text length"]
    assert text["edges"][0] == 5
    assert (text["read"][0], text["read"][1], text["read"][-1]) == (2, 1, 1)
    assert (text["kept"][0], text["kept"][1], text["kept"][-1]) == (2, 1, 0)
    assert sum(found["histograms"]["smaller side"]["read"]) == 3


def test_only_the_first_examples_are_kept(tmp_path):
    contents = [[Skipped("bad", f"{split}.{i}") for i in range(4)] for split in range(3)]
    job([*contents, [pair("good")]], tmp_path)
    assert report(tmp_path)["skipped"] == {"bad": 12}
    assert report(tmp_path)["examples"] == {"bad": ["0.0", "0.1", "0.2", "0.3", "1.0"]}


@pytest.mark.parametrize(
    ("limit", "first", "last"), [(0.28, 0.08, 0.48), (5, 1, 9), (-3, -5, -1), (0, -1, 1)]
)
def test_the_limit_of_a_score_is_an_edge(limit, first, last):
    for name in ("min_score", "max_score"):
        unit, edges = histogram_edges(Filters(**{name: {"clip": limit}}))["score clip"]
        assert unit == "" and edges == sorted(edges) and len(edges) == 41
        assert edges[20] == limit and edges[0] == pytest.approx(first)
        assert edges[-1] == pytest.approx(last)


def test_the_page_shows_samples_from_everywhere(tmp_path):
    contents = pairs(splits=7, size=8)
    contents[0][0] = pair("0-0000", encoded(make_image(1, 900, 300)), "the very first")
    job(contents, tmp_path, samples_per_shard=3)
    found = page(tmp_path)
    shown = [text for text in found.texts if re.fullmatch(r"\d-\d{4}", text)]
    order = [record.key for split in contents for record in split]
    places = [order.index(key) for key in shown]
    assert len(shown) == 24 and places == sorted(set(places))
    assert all(56 * i // 24 <= place < 56 * (i + 1) // 24 for i, place in enumerate(places))
    assert places != [56 * i // 24 for i in range(24)]
    images = [attributes["src"] for tag, attributes in found.elements if tag == "img"]
    assert len(images) == 24
    for source in images:
        kind, data = source.split(",")
        assert kind == "data:image/jpeg;base64"
        assert max(image_size(base64.b64decode(data))) <= 320
    assert found.count("svg") == 4 and "56" in found.texts


def test_everything_on_the_page_is_escaped_and_nothing_comes_from_elsewhere(tmp_path):
    folder = tmp_path / "<b>&set"
    contents = [
        [
            pair("one", caption=HOSTILE.replace("\ud800", "é"), **{"<i>": 3}),
            Record("two", turns=(Turn("<script>?", "</figure>"),), metadata={"<i>": 4}),
            Record("three", caption="y" * 500, metadata={"<i>": 1}),
            Skipped(HOSTILE, HOSTILE),
        ]
    ]
    job(contents, folder, filters=Filters(min_score={"<i>": 2}))
    html = (folder / "report.html").read_text()
    found = Page(html)
    assert not {"script", "i>"} & {tag for tag, _ in found.elements}
    assert found.count("figure") == 2
    text = "".join(found.texts)
    assert "<script>alert('1')</script>\"&amp; é" in text and "<script>? - </figure>" in text
    assert "<b>&set" in text and "score <i>" in text
    assert not re.search(r"https?:|url\(|@import", html)


def test_a_long_text_is_cut_on_the_page(tmp_path):
    job([[Record("a", caption="y" * 500), Record("b", caption="z" * 240)]], tmp_path)
    texts = page(tmp_path).texts
    assert "y" * 239 + "…" in texts and "z" * 240 in texts
    assert texts.count("no image") == 2


def test_the_summary_can_be_printed_whatever_a_sample_is_called(tmp_path):
    summary = str(job([[pair("one"), Skipped("odd", "\ud800.jpg")]], tmp_path / "set").report)
    assert "1 x odd (such as \\ud800.jpg)" in summary
    summary.encode()
