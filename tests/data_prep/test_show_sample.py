"""Samples shown: from a data set, from the rows of a run, in a terminal and on a page."""

import base64
import html
import io
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_data
import tiny_run
from PIL import Image

from megatron_owl2.cli import show_sample
from megatron_owl2.config.load import load_config
from megatron_owl2.config.templates import TEMPLATES
from megatron_owl2.data.conversation import measure
from megatron_owl2.data.image_tokens import IGNORE_INDEX
from megatron_owl2.data.lengths import SampleLengths, file_name, to_bytes
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.shards.records import Record, Turn
from megatron_owl2.data.spans import spans_of
from megatron_owl2.data.tokenizer import Tokenizer

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run's configuration, with shards of 60 samples, and a small data set of its own."""
    folder = tmp_path_factory.mktemp("shown")
    tiny_run.make(folder)
    jpegs = [tiny_data.encoded(Image.new("RGB", (40, 30), color)) for color in ("red", "blue")]
    records = [
        Record(
            "two",
            images=tuple(jpegs),
            turns=(Turn("<|image|><|image|>say", "it is"), Turn("yes", HOSTILE)),
            source="corpus",
        ),
        Record("text", turns=(Turn("say 1", "it is 1"),), system="sure"),
        Record("damaged", images=(jpegs[0][:300],), caption="it is"),
    ]
    tiny_data.write(folder / "own", records)
    return folder


def shown(folder: Path, capsys, *options) -> str:
    arguments = ["--config", folder / "run.yaml", *options]
    assert show_sample.main([*map(str, arguments)], "owl2 show-sample") == 0
    return capsys.readouterr().out


def test_a_sample_is_marked(folder, capsys):
    long = ["--sequence-length", 400]
    said = shown(folder, capsys, "--data", folder / "own", "--index", 1, 0, *long)
    text, two = said.split("\n\n")[:2]
    encode = Tokenizer(folder / "tokenizer.model").encode
    learnt = len(encode("it is 1")) + 1
    length = 1 + len(encode("sure USER: say 1 ASSISTANT:")) + learnt
    assert text.splitlines()[1:] == [
        f"  text of {folder / 'own'}; {length} positions, {learnt} supervised; 0 images",
        "<s>sure USER: say 1 ASSISTANT:«it is 1</s>»",
    ]
    assert text.startswith("sample 1\n") and "from 'corpus'; " in two and "; 2 images" in two
    assert "USER: [5 vision tokens][5 vision tokens]say ASSISTANT:«it is</s>»USER: yes" in two
    assert r"«<script>alert(1)</script>\x1b[31m\u202e</s>»" in two and "\x1b" not in two
    assert "shortened" not in said


def test_what_does_not_fit_is_told(folder, capsys):
    said = shown(folder, capsys, "--data", folder / "own", "--key", "two")
    assert "; shortened to fit\n" in said and said.count("ASSISTANT:") == 1


def test_options_replace_the_configuration(folder, capsys):
    data = ["--data", str(folder / "own"), "--tokenizer", str(folder / "tokenizer.model")]
    more = ["--template", "vicuna_v1", "--tokens-per-image", "7", "--sequence-length", "900"]
    assert show_sample.main([*data, *more], "owl2 show-sample") == 0
    said = capsys.readouterr().out
    assert f"<s>{TEMPLATES['vicuna_v1'].system} USER: [7 vision tokens][7 vision tokens]\nsay" in (
        said
    )


def test_ids_are_those_of_the_spans(folder, capsys):
    said = shown(folder, capsys, "--data", folder / "own", "--index", 1, "--ids")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    (learnt,) = re.findall(r"  learnt: (.*)", said)
    assert [*map(int, learnt.split())] == [*tokenizer.encode("it is 1"), tokenizer.eos_id]


def test_colors_are_for_terminals(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    said = shown(folder, capsys, "--data", folder / "own", "--index", 1)
    assert "\x1b[32mit is 1</s>\x1b[0m" in said and "«" not in said


def test_a_page_has_the_pixels_of_the_model_and_escapes_texts(folder, capsys):
    page = folder / "page.html"
    options = ["--sequence-length", 400, "--index", 0, "--html", page, "--ids"]
    assert shown(folder, capsys, "--data", folder / "own", *options) == ""
    text = page.read_text()
    assert "<script" not in text and html.escape(HOSTILE[:25]) in text
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    ]
    assert [picture.size for picture in pictures] == [(28, 28), (28, 28)]
    red, blue = (np.asarray(picture).reshape(-1, 3).mean(0) for picture in pictures)
    assert red[0] > 200 > 50 > red[2] and blue[2] > 200 > 50 > blue[0]
    assert '<span class="learnt">it is&lt;/s&gt;</span>' in text
    assert "http" not in text


def test_rows_are_those_of_training(folder, capsys):
    batches = tiny_run.batches(load_config(folder / "run.yaml"), 2)
    expected = next(batches).keys + next(batches).keys
    said = shown(folder, capsys, "--row", 0, 1, 2, 3)
    assert re.findall(r"^  (tiny\d+) of", said, re.M) == expected


def test_a_packed_row_shows_all_its_samples(folder, capsys):
    dataset = ShardedDataset(str(folder / "shards"))
    tokenizer = Tokenizer(folder / "tokenizer.model")
    table = np.array([measure(dataset[i], tokenizer) for i in range(60)], dtype=np.int32)
    lengths = to_bytes(SampleLengths(table[:, 0].copy(), table[:, 1].copy()), dataset)
    (folder / "shards" / file_name(tokenizer, TEMPLATES["owl2"])).write_bytes(lengths)
    packed = ["data.packing=true", "data.sequence_length=160", "train.epochs=1"]
    said = shown(folder, capsys, *packed, "--row", 0, 99)
    row, behind = re.split(r"^(?=row 99)", said, flags=re.M)
    filled = int(re.match(r"row 0: (\d+) of 160 positions", row)[1])
    each = [int(length) for length in re.findall(r"; (\d+) positions, ", row)]
    assert len(each) > 2 and sum(each) == filled <= 160
    assert behind == "row 99: empty\n\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "own", "--index", "3"], "has 3 samples, there is no 3"),
        (["--data", "own", "--index", "-4"], "has 3 samples, there is no -4"),
        (["--data", "own", "--key", "none"], "no sample with the key 'none'; 0 of its 3"),
        (["--data", "own", "--key", "damaged"], "image cannot be decoded"),
        (["--row", "-1"], "row -1: rows count from 0"),
        (["data.phase=2"], "data.phase is 2, whose rows depend"),
        (["data.sources=[]"], "data.sources is empty"),
        (["--tokens-per-image", "1"], "model.abstractor.num_queries is 0"),
        (["--tokenizer", "none.model"], "none.model: no such tokenizer model"),
    ],
)
def test_mistakes_are_one_line(folder, options, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert show_sample.main(["--config", "run.yaml", *options], "owl2 show-sample") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_spans_hold_every_token_once(folder):
    tokenizer = Tokenizer(folder / "tokenizer.model")
    tokens = np.array([1, 0, 0, 0, 0, 282, 281, 2, 280])
    modality = np.array([0, 1, 1, 1, 1, 0, 0, 0, 0])
    labels = np.full(9, IGNORE_INDEX)
    labels[5:7] = tokens[6:8]
    spans = spans_of(tokens, labels, modality, 2, tokenizer)
    kinds = ["given", "vision", "vision", "given", "learnt", "given"]
    assert [span.kind for span in spans] == kinds
    assert [i for span in spans for i in span.ids] == tokens.tolist()
