"""The command that makes the embedded corpus: interrupted, killed, run again, misused."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data_prep
from data_prep import shapes
from megatron_owl2.errors import PreprocessError

pytestmark = pytest.mark.slow

SMALL = shapes.Parameters(seed=7, pairs=40, instructions=60, texts=200, eval=40)
SCRIPT = Path(data_prep.__file__).with_name("shapes.py")


def test_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "train_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shapes.build_corpus(tmp_path / "corpus", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_killed_run_leaves_nothing_that_looks_finished(tmp_path):
    output = tmp_path / "corpus"
    command = [sys.executable, "-m", "data_prep.shapes", "--output", str(output)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=SCRIPT.parents[1]) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".corpus.partial-*/pairs/*.tar")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert not list(tmp_path.rglob("corpus.json"))
    assert shapes.build_corpus(output, SMALL)


def test_finished_corpus_is_reused_and_never_overwritten(tmp_path):
    corpus = tmp_path / "corpus"
    assert shapes.build_corpus(corpus, SMALL)
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert not shapes.build_corpus(corpus, SMALL)
    with pytest.raises(PreprocessError, match="'pairs': 40.*'pairs': 41"):
        shapes.build_corpus(
            corpus, shapes.Parameters(seed=7, pairs=41, instructions=60, texts=200, eval=40)
        )
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


@pytest.mark.parametrize("content", [None, "", "[]", '{"version": 1}'])
def test_foreign_folder_is_refused(tmp_path, content):
    (tmp_path / "notes.txt").write_text("mine")
    if content is not None:
        (tmp_path / "corpus.json").write_text(content)
    with pytest.raises(PreprocessError, match="not a finished corpus"):
        shapes.build_corpus(tmp_path, SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output"),
        (["--pairs", "0"], "pairs must be 1 or more, got 0"),
        (["--eval", "1"], "eval must be 2 or more"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--workers", "0"], "workers must be 1 or more"),
        (["--texts", "many"], "many"),
    ],
)
def test_bad_arguments_are_named_with_status_2(tmp_path, capsys, arguments, message):
    output = ["--output", str(tmp_path / "corpus")] if arguments else []
    with pytest.raises(SystemExit) as stop:
        shapes.main([*output, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_output_below_a_file_is_refused_with_status_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        shapes.main(["--output", str(tmp_path / "file/corpus")])
    assert stop.value.code == 2
    assert "cannot be created" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "folder"),
    [([str(SCRIPT)], None), (["-m", "data_prep.shapes"], SCRIPT.parents[1])],
    ids=["script from any folder", "module from the repository"],
)
def test_command_line_runs(tmp_path, command, folder):
    sizes = ["--pairs", "5", "--instructions", "5", "--texts", "5", "--eval", "2"]
    full = [sys.executable, *command, "--output", str(tmp_path / "corpus"), *sizes]
    for expected in ("written", "already complete"):
        done = subprocess.run(full, cwd=folder or tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    assert json.loads((tmp_path / "corpus/corpus.json").read_text())["counts"]["pairs"] == 5
