"""New formats and corpora: one new file each, and the commands offer and accept them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from preprocess_run import records

from data_prep import formats
from data_prep.downloads import corpora
from data_prep.downloads.registry import CORPORA, find_corpora
from data_prep.formats.registry import FORMATS, find_formats

pytestmark = pytest.mark.slow

FORMAT = '''
"""Texts, one in a line: a format that no corpus has."""

from data_prep.corpus_files import find_files
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, InputSplit, Skipped
from megatron_owl2.data.shards.records import Record


class Lines:
    name = "mine"

    def plan(self, source, options):
        paths, unread = find_files(source).select(lambda path: path.suffix == ".txt")
        splits = [InputSplit(path.stem, str(path.stat().st_size), path, path) for path in paths]
        return InputPlan(splits, unread)

    def read(self, payload):
        for number, line in enumerate(payload.read_text().splitlines()):
            if line:
                yield Record(f"{number:04d}", caption=line, source=payload.stem)
            else:
                yield Skipped("empty line", f"{payload.name}, line {number + 1}")


FORMATS: tuple[Format, ...] = (Lines(),)
'''

CORPUS = '''
"""A corpus that nobody has published."""

from data_prep.downloads.corpus import Corpus

CORPUS = Corpus(
    name="mine",
    about="mine.tsv: address TAB caption TAB beauty, without a header",
    header=("url", "caption", "beauty"),
    scores={"beauty": "in the eye of the beholder; higher is better"},
)
'''


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of what a contributor edits; the package beside it is the one under test."""
    folder = tmp_path / "project"
    for name in ("data_prep", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(project: Path, tool: str, *arguments) -> str:
    """What a tool of the copy prints."""
    result = subprocess.run(
        [sys.executable, project / "tools" / tool, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{project}:{ROOT}"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_format_is_one_new_file(project, tmp_path):
    (project / "data_prep/formats/mine.py").write_text(FORMAT)
    source, output = tmp_path / "texts", tmp_path / "set"
    source.mkdir()
    for name in ("one", "two"):
        (source / f"{name}.txt").write_text(f"first of {name}\n\nthird of {name}\n")
    out = run(
        project,
        "preprocess_data.py",
        *("--format", "mine", "--input", source, "--output", output, "--workers", 2),
    )
    assert "kept 4, skipped 2\n  2 x empty line (such as one.txt, line 2)" in out
    found = [(record.key, record.caption) for record in records(output)]
    assert found == [
        ("0000", "first of one"),
        ("0002", "third of one"),
        ("0000", "first of two"),
        ("0002", "third of two"),
    ]
    assert json.loads((output / "preprocess/job.json").read_text())["format"] == "mine"
    assert "mine" in run(project, "preprocess_data.py", "--help")


def test_a_corpus_is_one_new_file(project, tmp_path):
    (project / "data_prep/downloads/corpora/mine.py").write_text(CORPUS)
    table = tmp_path / "mine.tsv"
    rows = [f"http://x/{i}.jpg\tcaption {i}\t{i / 10}" for i in range(10)]
    table.write_text("\n".join(rows) + "\n")
    out = run(
        project,
        "prepare_downloads.py",
        *("--corpus", "mine", "--input", table, "--output", tmp_path / "list"),
        *("--min-score", "beauty=0.6"),
    )
    assert "listed 4 of 10 rows" in out
    assert "Downloads the images of mine" in (tmp_path / "list/download.sh").read_text()
    text = run(project, "prepare_downloads.py", "--help")
    assert "mine: mine.tsv: address TAB caption TAB beauty, without a header" in text
    assert "    beauty: in the eye of the beholder; higher is better" in text


def test_the_names_of_formats_and_corpora_stay():
    assert list(FORMATS) == [
        "alpaca",
        "aokvqa",
        "baize",
        "coco",
        "coco-instruction",
        "coco-one-caption",
        "conversations",
        "documents",
        "gqa",
        "img2dataset",
        "ocrvqa",
        "okvqa",
        "owl1",
        "refcoco",
        "table",
        "textcaps",
        "visual-genome",
        "vqav2",
        "webdataset",
    ]
    assert list(CORPORA) == ["cc3m", "cc12m", "coyo", "datacomp", "laion"]


@pytest.mark.parametrize(
    ("package", "find", "text", "error"),
    [
        (formats, find_formats, "FORMAT = 1", r"mistaken\.py does not define FORMATS"),
        (formats, find_formats, "FORMATS = (1,)", "mistaken: 1 does not have name, plan and read"),
        (formats, find_formats, "from data_prep.formats.table import FORMATS", "'table' exists"),
        (corpora, find_corpora, "CORPORA = 1", r"mistaken\.py does not define CORPUS"),
        (corpora, find_corpora, "CORPUS = 1", "mistaken: CORPUS is 1, not a Corpus"),
        (corpora, find_corpora, "from data_prep.downloads.corpora.coyo import CORPUS", "'coyo' ex"),
    ],
)
def test_a_mistaken_file_is_named(tmp_path, monkeypatch, package, find, text, error):
    (tmp_path / "mistaken.py").write_text(text)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    try:
        with pytest.raises(TypeError, match=error):
            find()
    finally:
        sys.modules.pop(f"{package.__name__}.mistaken", None)
