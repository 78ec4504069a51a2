"""Evaluations that are killed, go on, and end as if nothing had been; and their shares of ranks."""

import json
import re
from pathlib import Path

import processes
import pytest
from evaluations import build_corpus, build_model
from paths import HELPERS

from megatron_owl2.cli.evaluate import main
from megatron_owl2.evaluation.asking import batches_of, share_of
from megatron_owl2.evaluation.journal import journal_of
from megatron_owl2.evaluation.question import Question

pytestmark = pytest.mark.distributed

KILLED = HELPERS / "killed_evaluation.py"
# What waits for the disk: the journal's first line, a line for each of four batches, predictions,
# mistakes.html, results.json, results.md and at last scores.json.
MOMENTS = [(1, 1), (1, 0), (2, 1), (2, 0), (3, 0), (5, 0)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("shapes") / "corpus")


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    return build_model(corpus / "tokenizer/tokenizer.model", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def options(corpus, model):
    """Ten questions in batches of three, but for the output."""
    task = ["--task", "vqav2", "--data", corpus / "eval/seen", "--batch-size", 3, "--limit", 10]
    return list(map(str, ["--checkpoint", model, *task, "--max-new-tokens", 4]))


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """What an evaluation writes that nobody stops."""
    output = tmp_path_factory.mktemp("whole")
    assert main([*options, "--output", str(output)]) == 0
    return output


def predictions(output: Path) -> bytes:
    return (output / "predictions.jsonl").read_bytes()


def scores(output: Path) -> dict:
    written = json.loads((output / "scores.json").read_text())
    return {k: v for k, v in written.items() if k not in ("seconds", "questions_per_second")}


def test_a_killed_evaluation_ends_as_one_that_was_not(options, whole, tmp_path):
    output = tmp_path / "out"
    lines = []
    for moment, torn in MOMENTS:
        program = [KILLED, moment, torn, 0, *options, "--output", output]
        job = processes.run_ranks(1, *program)
        assert job.returncode == -9, job.stderr
        journal = (output / "journal-0.jsonl").read_bytes()
        lines.append(journal.count(b"\n"))
        assert journal.endswith(b"\n") != bool(torn) and not (output / "scores.json").exists()
    # A line for the settings, then one more batch each time, but for those that were torn.
    assert lines == [0, 1, 2, 4, 5, 5]
    assert (output / "mistakes.html").exists() and main([*options, "--output", str(output)]) == 0
    assert predictions(output) == predictions(whole) and scores(output) == scores(whole)
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in whole.iterdir()} and "journal-0.jsonl" not in names


def test_other_settings_are_never_mixed(corpus, options, whole, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    rest = ["--output", str(output)]
    assert processes.run_ranks(1, KILLED, 3, 0, 0, *options, *rest).returncode == -9
    before = (output / "journal-0.jsonl").read_bytes()
    other = build_model(corpus / "tokenizer/tokenizer.model", tmp_path / "other", seed=2)
    changes = ["--batch-size", 4, "--limit", 9, "--prompt", "official", "--prompt-suffix", " x"]
    changes += ["--max-new-tokens", 5, "--variant", "evalai", "--blind"]
    for change, *told in (
        (
            list(map(str, changes)),
            "batch_size was 3 and is 4",
            "limit was 10 and is 9",
            "prompt was 'owl2' and is 'official'",
            "prompt_suffix was .* and is ' x'",
            "max_new_tokens was 4 and is 5",
            "variant was 'owl2' and is 'evalai'",
            "blind was False and is True",
            "questions was '10 of .*' and is '9 of ",
        ),
        (["--checkpoint", str(other)], "model was .*; model_content was "),
    ):
        capsys.readouterr()
        assert main([*options, *change, *rest]) == 2
        error = capsys.readouterr().err
        assert "holds an unfinished evaluation with other settings: " in error
        assert all(re.search(text, error) for text in told) and "--restart" in error, error
    assert (output / "journal-0.jsonl").read_bytes() == before
    assert main([*options, "--batch-size", "4", "--restart", *rest]) == 0
    assert predictions(output) == predictions(whole)  # whatever the batches, in fp32
    assert main([*options, *rest]) == 0  # a finished one is replaced


def test_a_finished_evaluation_is_not_begun_again(options, whole, tmp_path, monkeypatch, capsys):
    from megatron_owl2.evaluation import runner

    monkeypatch.setattr(runner, "Generator", None)
    times = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    (whole / "journal-0.jsonl").touch()  # of a process that was killed at the very end
    assert main([*options, "--output", str(whole)]) == 0
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == times
    assert "is finished; --restart asks again" in capsys.readouterr().out


def test_damaged_journals_are_named(options, whole, tmp_path, capsys):
    output = tmp_path / "out"
    rest = ["--output", str(output)]
    assert processes.run_ranks(1, KILLED, 4, 0, 0, *options, *rest).returncode == -9
    journal = output / "journal-0.jsonl"
    settings, first, *more = journal.read_text().splitlines(keepends=True)
    for lines, told in (
        ([settings, "{}\n", first], "is damaged: line 2 names no batch"),
        ([settings, first, "\0\0\n", *more], "is damaged: line 3: "),
        ([settings, first.replace("[", '["x", '), *more], "line 2 has not its answers"),
        ([settings, first, first.replace('["', '["other ')], "line 3 answers batch 0 anew"),
        ([first], "is no journal of an evaluation"),
    ):
        journal.write_text("".join(lines))
        assert main([*options, *rest]) == 2
        error = capsys.readouterr().err
        assert told in error and "journal-0.jsonl" in error and "--restart" in error
    journal.write_text(settings + first.replace('"images": "', '"images": "of other ones '))
    assert main([*options, *rest]) == 0 and predictions(output) == predictions(whole)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 10, 11])
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_shares_are_whole_and_without_repetition(count, groups):
    batches = batches_of([Question(n, "?", (), "x", None) for n in range(count)], 3)
    assert [place for batch in batches for place in batch] == list(range(count))
    assert all(len(batch) == 3 for batch in batches[:-1])
    for finished in (set(), {0}, {0, 2, 3}):
        shares = [share_of(len(batches), finished, group, groups) for group in range(groups)]
        asked = sorted(number for share in shares for number in share)
        assert asked == [n for n in range(len(batches)) if n not in finished]
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_ranks_share_the_questions(options, whole, tmp_path):
    """One launch of two ranks: shares, fewer questions than ranks, errors of one rank, a suite."""
    program = HELPERS / "evaluation_ranks.py"
    done = processes.run_ranks(2, program, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    for name in ("shared", "resumed", "latest", "split"):
        assert predictions(tmp_path / name) == predictions(whole), name
        assert not list((tmp_path / name).glob("journal*"))
    one = predictions(tmp_path / "one").splitlines(keepends=True)
    assert one == predictions(whole).splitlines(keepends=True)[:1]
    assert scores(tmp_path / "split")["overall"] == scores(whole)["overall"]


def test_a_killed_rank_leaves_what_one_process_ends(options, whole, tmp_path):
    rest = ["--tensor-parallel", "1", "--output", tmp_path]
    done = processes.run_ranks(2, KILLED, 2, 0, 1, *options, *rest)  # one batch by rank 1
    assert done.returncode != 0 and not (tmp_path / "scores.json").exists()
    lines = (tmp_path / "journal-1.jsonl").read_bytes().count(b"\n")
    assert lines == 2 and main([*options, "--output", str(tmp_path)]) == 0
    assert predictions(tmp_path) == predictions(whole)


def test_two_evaluations_do_not_write_one_journal(options, tmp_path, capsys):
    with journal_of(tmp_path, 0, {}, []):
        assert main([*options, "--output", str(tmp_path)]) == 2
    assert "another process writes" in capsys.readouterr().err
