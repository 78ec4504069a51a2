"""Corpus report of preprocessing: counts, histograms, and the page to look at."""

import base64
import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import chain

import pytest
from preprocess_run import job, pair, pairs, report, succeeded, tool, tree
from tiny_data import encoded, make_image

from data_prep.corpus_statistics import StatisticsBuilder, histogram_edges
from data_prep.filters import Filters
from data_prep.splits import Skipped
from megatron_owl2.data.images import image_size
from megatron_owl2.data.shards.records import Record, Turn
from megatron_owl2.errors import PreprocessError

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


def skipped_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "preprocess/skipped.jsonl").open()]


@pytest.mark.parametrize("two_readings", [False, True])
def test_every_fault_is_listed_and_of_choices_five_examples(tmp_path, two_readings):
    image = encoded(make_image(1, 200, 100))
    contents = [
        [
            *(Skipped("bad", f"{split}.{i}\ud800") for i in range(8)),
            *(pair(f"{i}", caption="long" * (i + 1)) for i in range(6)),
            *(pair(f"cut{i}", image[: len(image) // 2]) for i in range(4)),
        ]
        for split in range(3)
    ]
    options = {"filters": Filters(min_caption=8), "sample": 4 if two_readings else None}
    outcome = job(contents, tmp_path / "one", **options)
    lines = skipped_lines(tmp_path / "one")
    listed = Counter(line["reason"] for line in lines)
    assert listed["bad"] == 24 and listed["image cannot be decoded"] == 12
    assert listed["caption below 8 characters"] == 3
    assert listed["not in the sample"] == (5 if two_readings else 0)
    assert [line["reason"] for line in lines] == list(
        chain.from_iterable([reason] * listed[reason] for reason in outcome.report.skipped)
    )
    assert [line["detail"] for line in lines if line["reason"] == "bad"] == [
        f"{split}.{i}\ud800" for split in range(3) for i in range(8)
    ]
    assert all(len(examples) <= 5 for examples in report(tmp_path / "one")["examples"].values())
    if not two_readings:
        for index in (1, 0):
            job(contents, tmp_path / "shared/one", partition=(index, 2), **options)
        job(contents, tmp_path / "shared/one", merge=True, **options)
        assert tree(tmp_path / "shared/one") == tree(tmp_path / "one")


def test_at_most_ten_thousand_faults_of_a_reason_are_listed(tmp_path):
    contents = [[Skipped("bad", f"{split}.{i}") for i in range(6000)] for split in range(2)]
    job([*contents, [Skipped("bad", "2.0"), Skipped("odd", "2.1"), pair("good")]], tmp_path)
    lines = skipped_lines(tmp_path)
    assert len(lines) == 10_001 and report(tmp_path)["skipped"] == {"bad": 12_001, "odd": 1}
    assert lines[9999]["detail"] == "1.3999" and lines[-1] == {"reason": "odd", "detail": "2.1"}
    builder = StatisticsBuilder(Filters())
    for number in range(20_000):
        builder.skip(Skipped("bad", str(number)))
        builder.skip(Skipped("chosen", str(number), expected=True))
    state = builder.to_json()
    assert len(state["faults"]["bad"]) == 10_000 and "chosen" not in state["faults"]


def test_a_corpus_of_faults_alone_is_listed_too(tmp_path):
    with pytest.raises(PreprocessError, match=r"(?s)no sample was kept.*preprocess/skipped\.jsonl"):
        job([[Skipped("bad", "1"), Skipped("bad", "2")]], tmp_path)
    assert [line["detail"] for line in skipped_lines(tmp_path)] == ["1", "2"]


def test_states_of_earlier_versions_are_listed_by_their_examples(tmp_path):
    contents = [[pair("a"), *(Skipped("bad", f"{i}") for i in range(9))], [pair("b")]]
    job(contents, tmp_path, partition=(0, 2))
    path = tmp_path / "preprocess/parts/part0.json"
    state = json.loads(path.read_text())
    del state["faults"]
    path.write_text(json.dumps(state))
    job(contents, tmp_path, partition=(1, 2))
    job(contents, tmp_path, merge=True)
    assert report(tmp_path)["skipped"] == {"bad": 9}
    assert [line["detail"] for line in skipped_lines(tmp_path)] == ["0", "1", "2", "3", "4"]


def test_the_summary_names_the_list_of_what_was_left_out(tmp_path):
    source = tmp_path / "talk.json"
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    source.write_text(json.dumps([{"conversations": turns}, 7]))
    listed = f"{tmp_path / 'set' / 'preprocess/skipped.jsonl'}"
    assert listed in succeeded(tool(source, "conversations", tmp_path / "set"))
    source.write_text(json.dumps([{"conversations": turns}]))
    assert "skipped.jsonl" not in succeeded(tool(source, "conversations", tmp_path / "whole"))


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
