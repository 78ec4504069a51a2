"""Lengths of samples: measured as they are built, kept beside the shards, refused when stale."""

import os
import re

import dialogues
import numpy as np
import pytest
import tiny_data
from tool import run

from data_prep.measure import measure_lengths
from megatron_owl2.config.templates import OWL2, TEMPLATES, template_of
from megatron_owl2.data.conversation import build_sample, measure
from megatron_owl2.data.lengths import ENCODING, file_name, load_lengths
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.shards.records import Record, Turn
from megatron_owl2.data.tokenizer import Tokenizer, train_tokenizer
from megatron_owl2.errors import DataError, ShardError

VICUNA = TEMPLATES["vicuna_v1"]
OWL1, RELEASED = TEMPLATES["owl1"], template_of("owl1", "official_train")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    words = [f"USER: say {i} ASSISTANT: it is {i} sure? yes" for i in range(60)]
    return train_tokenizer(words, tmp_path_factory.mktemp("t") / "tokenizer.model", 320)


@pytest.mark.parametrize(
    "template", [OWL2, VICUNA, OWL1, RELEASED], ids=lambda t: f"{t.name}-{t.tokenization}"
)
def test_they_are_those_of_the_samples(tmp_path, tokenizer, template):
    odd = Record("odd", turns=(Turn("</s><|image|> é", "<s>"), Turn("b", "c")), system="Be kind.")
    records = [*map(dialogues.dialogue, range(23)), odd]
    tiny_data.write(tmp_path / "set", records)
    workers = 2 if template is OWL2 else 1
    measured = measure_lengths(tmp_path / "set", tokenizer, template, workers)
    assert measured.bad == 0 and measured.path.name == file_name(tokenizer, template)
    dataset = ShardedDataset(str(tmp_path / "set"))
    found = load_lengths(dataset, tokenizer, template)
    for index, record in enumerate(records):
        sample = build_sample(record, tokenizer, 7, 4096, template)
        assert found.images[index] == sample.image_count == len(record.images)
        assert found.text[index] + 7 * found.images[index] == sample.length


def test_a_folder_that_may_not_be_written_to_is_told_before_it_is_measured(
    tmp_path, tokenizer, monkeypatch
):
    folder = tiny_data.write(tmp_path / "set", map(dialogues.dialogue, range(3)))
    for path in folder.glob("*.tar"):
        path.unlink()  # is not looked at
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(ShardError, match=f"{folder} may not be written to; .* folder of links"):
        measure_lengths(folder, tokenizer, OWL2)


class Characters:
    """A tokenizer whose pieces are characters."""

    bos_id, eos_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [3 + ord(character) for character in text]


def test_other_numbers_need_another_name():
    """Files of lengths are found by ENCODING: whoever changes these numbers raises it."""
    image = b"\xff\xd8\xff"
    records = [
        Record("caption", (image,), caption="a dog"),
        Record("text", turns=(Turn("q", "an answer"), Turn("<|image|> ", "b"))),
        Record("first", (image,), turns=(Turn("<|image|> what ?\n", " it "),), system="Be kind."),
        Record("two", (image, image), turns=(Turn("what ?", "it"), Turn("and", "so"))),
        Record("within", (image, image), turns=(Turn("<|image|> <|image|>a", "b"),)),
    ]
    templates = (OWL2, VICUNA, OWL1, RELEASED)
    found = [[measure(r, Characters(), t) for r in records] for t in templates]  # type: ignore[arg-type]
    assert (ENCODING, found) == (
        1,
        [
            [(7, 1), (58, 0), (38, 1), (50, 2), (21, 2)],
            [(7, 1), (213, 0), (39, 1), (206, 2), (177, 2)],
            [(7, 1), (204, 0), (40, 1), (212, 2), (188, 2)],
            [(7, 1), (206, 0), (41, 1), (214, 2), (189, 2)],
        ],
    )


class Fingerprint:
    fingerprint = "0" * 64


def test_files_that_were_measured_keep_their_names():
    names = [file_name(Fingerprint(), t) for t in (OWL2, VICUNA, OWL1, RELEASED)]  # type: ignore[arg-type]
    assert names[:2] == [
        "lengths.16f8336c1dc6a047.safetensors",
        "lengths.639f3139a9a8dfd7.safetensors",
    ]
    assert len({*names}) == 4


def test_a_sample_that_cannot_be_read_has_none(tmp_path, tokenizer):
    folder = tiny_data.write(tmp_path / "set", map(dialogues.dialogue, range(10)))
    start, stop = ShardedDataset(str(folder)).range_of(0, 3)
    with (folder / "shard-000000.tar").open("r+b") as file:
        file.seek((start + stop) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    measured = measure_lengths(folder, tokenizer, OWL2)
    assert measured.bad == 1 and np.flatnonzero(measured.lengths.text == 0).tolist() == [3]


def test_missing_stale_and_damaged_lengths_name_the_fix(tmp_path, tokenizer):
    folder = tiny_data.write(tmp_path / "set", map(dialogues.dialogue, range(10)))
    fix = f"owl2 measure-lengths {folder} --tokenizer {tokenizer.path} --template vicuna_v1"
    measure_lengths(folder, tokenizer, OWL2)
    with pytest.raises(DataError, match=f"holds no lengths .* {fix}"):
        load_lengths(ShardedDataset(str(folder)), tokenizer, VICUNA)
    path = measure_lengths(folder, tokenizer, VICUNA).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(DataError, match=f"is damaged .* {fix}"):
        load_lengths(ShardedDataset(str(folder)), tokenizer, VICUNA)
    fix = f"--tokenizer {tokenizer.path} --template owl1 --tokenization official_train$"
    measure_lengths(folder, tokenizer, OWL1)
    with pytest.raises(DataError, match=f"holds no lengths .* {fix}"):
        load_lengths(ShardedDataset(str(folder)), tokenizer, RELEASED)
    other = tiny_data.write(tmp_path / "other", map(dialogues.dialogue, range(11)))
    (other / path.name).write_bytes(whole)
    with pytest.raises(DataError, match="not of these shards"):
        load_lengths(ShardedDataset(str(other)), tokenizer, VICUNA)


def test_where_nothing_can_be_written_a_copy_is_measured(tmp_path, tokenizer, monkeypatch):
    folder = tiny_data.write(tmp_path / "set", map(dialogues.dialogue, range(3)))
    dataset = ShardedDataset(str(folder))
    monkeypatch.setattr(dataset, "location", "s3://bucket/set")
    with pytest.raises(DataError, match=r"measure a copy on a disk.*measure-lengths COPY --token"):
        load_lengths(dataset, tokenizer, OWL2)
    done = run("measure_lengths", "s3://bucket/set", "--tokenizer", tokenizer.path)
    assert done.returncode == 2 and "s3://bucket/set is not on a disk" in done.stderr


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (("owl1", "official_inference"), "asks only, .* train with turns or official_train"),
        (("owl2", "official_train"), "looks for the words of model.template owl1, which owl2 has"),
    ],
)
def test_rules_that_make_no_samples_are_refused(tmp_path, tokenizer, rules, said):
    folder = tiny_data.write(tmp_path / "set", map(dialogues.dialogue, range(3)))
    given = ("--tokenizer", tokenizer.path, "--template", rules[0], "--tokenization", rules[1])
    for done in (
        run("measure_lengths", folder, *given),
        run("show_sample", "--data", folder, *given),
    ):
        assert done.returncode == 2 and re.search(said, done.stderr), done.stderr
    assert not [*folder.glob("lengths.*")]


@pytest.mark.slow
def test_preprocessing_and_the_verb_measure_alike(tmp_path, tokenizer):
    corpus = tmp_path / "talk.json"
    corpus.write_text(
        '[{"conversations": [{"from": "human", "value": "say 1"}, '
        '{"from": "gpt", "value": "it is 1"}]}]'
    )
    given = ("--format", "conversations", "--input", corpus, "--tokenizer", tokenizer.path)
    refused = run("preprocess_data", *given[:-1], corpus, "--output", tmp_path / "no")
    assert refused.returncode == 1 and "not a SentencePiece model" in refused.stderr
    assert not (tmp_path / "no").exists()
    done = run("preprocess_data", *given, "--output", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    count = build_sample(Record("k", turns=(Turn("say 1", "it is 1"),)), tokenizer, 5, 64).length
    assert f"1 samples of {count}.0 ids of text (at most {count}) and 0.00 im" in done.stdout
    path = tmp_path / "set" / file_name(tokenizer, OWL2)
    written = path.read_bytes()
    assert "ids of text" not in run("preprocess_data", *given, "--output", tmp_path / "set").stdout
    path.unlink()
    again = run("measure_lengths", tmp_path / "set", "--tokenizer", tokenizer.path)
    assert again.returncode == 0 and path.read_bytes() == written
