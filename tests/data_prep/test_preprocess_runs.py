"""Preprocessing again and again: partitions, interruptions, killed processes, full disks."""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from preprocess_run import (
    ENVIRONMENT,
    as_splits,
    command,
    job,
    keys,
    pair,
    pairs,
    read_list,
    report,
    succeeded,
    tool,
    tree,
)
from processes import group_is_gone, wait_until

import data_prep.job
from data_prep.job import preprocess
from data_prep.reencode import Reencoding
from data_prep.splits import InputPlan, InputSplit, Skipped
from data_prep.worker import Settings
from megatron_owl2.errors import PreprocessError

pytestmark = pytest.mark.slow

OPTIONS = {
    "one reading": {"reencoding": Reencoding(max_side=20), "sample": 0.5},
    "two readings": {"reencoding": Reencoding(jpeg_quality=60), "sample": 20},
    "duplicates": {"deduplicate": "pair", "sample": 0.5, "seed": 3},
}
UNFINISHED = "preprocess/unfinished"


@pytest.fixture(scope="module")
def corpus():
    return pairs(splits=5, size=8)


@pytest.mark.parametrize("name", OPTIONS)
def test_bytes_do_not_depend_on_workers_or_partitions(corpus, tmp_path, name):
    options = OPTIONS[name] | {"samples_per_shard": 2}
    corpus = [[Skipped("bad", f"{i}.{j}") for j in range(9)] + c for i, c in enumerate(corpus)]
    job(corpus, tmp_path / "one/set", **options)
    expected = tree(tmp_path / "one/set")
    assert expected["preprocess/skipped.jsonl"].count(b'"bad"') == 45
    assert 10 <= report(tmp_path / "one/set")["kept"] <= 30
    assert {"report.json", "report.html", "manifest.json"} < expected.keys()

    job(corpus, tmp_path / "two/set", workers=2, **options)
    assert tree(tmp_path / "two/set") == expected

    shared = tmp_path / "shared/set"
    for _ in range(1 if name == "one reading" else 2):
        for index in (2, 0, 1):
            assert job(corpus, shared, partition=(index, 3), **options).report is None
            assert not (shared / "manifest.json").exists()
        merged = job(corpus, shared, merge=True, **options)
    assert merged.report is not None and merged.finished
    assert tree(shared) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_merge_says_which_parts_are_missing(corpus, tmp_path, name):
    options, output = OPTIONS[name], tmp_path / "set"
    twice = name != "one reading"
    with pytest.raises(PreprocessError, match=r"5 of 5 splits are not (scanned|written) yet"):
        job(corpus, output, merge=True, **options)
    job(corpus, output, partition=(0, 2), **options)
    word = "scanned" if twice else "written"
    with pytest.raises(PreprocessError, match=f"2 of 5 splits are not {word} yet: part1, part3"):
        job(corpus, output, merge=True, **options)
    if twice:
        job(corpus, output, partition=(1, 2), **options)
        assert job(corpus, output, merge=True, **options).selected
        with pytest.raises(PreprocessError, match="5 of 5 splits are not written yet"):
            job(corpus, output, merge=True, **options)
    assert not (output / "manifest.json").exists()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_interrupted_run_continues(corpus, tmp_path, name):
    output, options = tmp_path / "set", OPTIONS[name]
    job(corpus, output, **options)
    expected = tree(output)
    (output / "manifest.json").unlink()
    (output / "preprocess/parts/part1.json").unlink()
    (output / "part1-000000.tar").write_bytes(b"half")
    kept = (output / "part0-000000.tar").stat().st_mtime_ns
    assert job(corpus, output, **options).written == 1
    assert tree(output) == expected
    assert (output / "part0-000000.tar").stat().st_mtime_ns == kept


def test_a_shard_that_is_lost_before_the_end_is_made_again(corpus, tmp_path):
    output = tmp_path / "set"
    for index in (0, 1):
        job(corpus, output, partition=(index, 2))
    os.truncate(output / "part2-000000.tar", 1000)
    (output / "part3-000000.tar").unlink()
    with pytest.raises(PreprocessError, match="2 of 5 splits are not written yet: part2, part3"):
        job(corpus, output, merge=True)
    assert job(corpus, output, partition=(0, 2)).written == 1
    assert job(corpus, output).written == 1
    assert len(keys(output)) == 40


def test_finished_output_is_left_alone_and_another_job_refused(corpus, tmp_path):
    output = tmp_path / "set"
    job(corpus, output)

    def times():
        return {path: path.stat().st_mtime_ns for path in output.rglob("*")}

    before = times()
    again = job(corpus, output)
    assert (again.report.kept, again.written, again.finished) == (40, 0, False)
    for options in ({"samples_per_shard": 3}, {"deduplicate": "image"}, {"sample": 7}):
        (name,) = options
        with pytest.raises(PreprocessError, match=rf"another job \(different: {name}\)"):
            job(corpus, output, **options)
    with pytest.raises(PreprocessError, match=r"the input changed since .*\(split part4: 4, now g"):
        job(corpus[:4], output)
    assert before == times()


def test_a_changed_input_between_two_readings_is_refused(corpus, tmp_path):
    output, settings = tmp_path / "set", Settings(read_list, sample=30)
    splits = as_splits(corpus)
    for index in (0, 1):
        preprocess(InputPlan(splits), settings, output, {}, partition=(index, 2))
    preprocess(InputPlan(splits), settings, output, {}, merge=True)
    another = pair(corpus[3][7].key, corpus[3][7].images[0], "another caption")
    for changed in ([*corpus[3][:7], another], corpus[3][:7], [*corpus[3][1:], corpus[3][0]]):
        splits[3] = InputSplit("part3", "3", changed, Path("input3"))
        with pytest.raises(PreprocessError, match="split part3: sample . is not what the first"):
            preprocess(InputPlan(splits), settings, output, {})
        assert not list(output.glob("part3*")) and not list((output / UNFINISHED).iterdir())


@pytest.mark.parametrize("name", ["two readings", "duplicates"])
def test_two_runs_may_select_at_once(corpus, tmp_path, monkeypatch, name):
    """One begins to select, and the other does all of the work before it is through."""
    options, select = OPTIONS[name], data_prep.job.select
    job(corpus, tmp_path / "alone/set", **options)

    def overtaken(*arguments, **more):
        monkeypatch.setattr(data_prep.job, "select", select)
        assert job(corpus, tmp_path / "set", **options).selected
        return select(*arguments, **more)

    monkeypatch.setattr(data_prep.job, "select", overtaken)
    assert job(corpus, tmp_path / "set", **options).finished
    assert tree(tmp_path / "set") == tree(tmp_path / "alone/set")


def read_and_die(items: list) -> Iterator:
    """A reader that is killed in the middle of part2, once others have begun."""
    for index, item in enumerate(items):
        if item.key == "2-0004":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 4:
            time.sleep(0.5)
        yield item


def test_a_killed_worker_is_a_clear_error_and_leaves_nothing(corpus, tmp_path):
    output = tmp_path / "set"
    with pytest.raises(PreprocessError, match="process was killed.*in work: .*part2.*--workers"):
        job(corpus, output, read=read_and_die, workers=2)
    assert not list(output.glob("part2*")) and not (output / "manifest.json").exists()
    assert list((output / UNFINISHED).iterdir())
    outcome = job(corpus, output)
    assert outcome.report.kept == 40 and outcome.written < 5
    assert not list((output / UNFINISHED).iterdir())


def read_badly_or_slowly(items: list) -> Iterator:
    """A reader that fails in part0; part1 would take two minutes."""
    for item in items:
        if item.key == "0-0004":
            time.sleep(1)
            raise ValueError("a mistake in the reader")
        if item.key == "1-0000":
            for _ in range(1200):
                time.sleep(0.1)
                yield item
        yield item


def test_an_error_in_one_split_names_it_and_stops_the_others(corpus, tmp_path):
    start = time.monotonic()
    with pytest.raises(ValueError, match="a mistake in the reader") as caught:
        job(corpus[:2], tmp_path / "set", read=read_badly_or_slowly, workers=2)
    assert caught.value.__notes__ == ["while working on split part0"]
    assert time.monotonic() - start < 60
    assert not list((tmp_path / "set" / UNFINISHED).iterdir())


def test_leftovers_of_the_living_stay(corpus, tmp_path):
    output = tmp_path / "set"
    job(corpus, output, partition=(0, 2))
    here, there = socket.gethostname(), "another-node"
    day = 24 * 3600

    def leave(name: str, age: float) -> tuple[Path, Path]:
        folder = output / UNFINISHED / name
        lock = folder.with_name(f"{name}.lock")
        folder.mkdir()
        for path in (folder / "shard.tar", lock):
            path.write_bytes(b"half")
        for path in (folder / "shard.tar", lock, folder):
            os.utime(path, (time.time() - age,) * 2)
        return folder, lock

    living = [*leave(f"{here}.1.part1", 2 * day), *leave(f"{there}.2.part1", day - 60)]
    dead = [*leave(f"{here}.3.part1", 0), *leave(f"{there}.4.part1", day + 60)]
    with living[1].open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job(corpus, output)
    assert all(path.exists() for path in living)
    assert not any(path.exists() for path in dead)


@pytest.mark.parametrize("ending", [".tar", ".tar.idx", ".tar.sums"])
def test_a_part_whose_files_are_gone_is_done_again(corpus, tmp_path, ending):
    output = tmp_path / "set"
    for number in range(2):
        job(corpus, output, partition=(number, 2))
    expected = tree(output)
    lost = sorted(output.glob(f"*{ending}"))[0]
    lost.unlink()
    job(corpus, output, partition=(0, 2))
    job(corpus, output, partition=(1, 2))
    assert tree(output) == expected


def test_leftovers_may_vanish_while_they_are_looked_at(corpus, tmp_path, monkeypatch):
    """Another node ends its split, and deletes its folder, at any moment."""
    output = tmp_path / "set"
    job(corpus, output, partition=(0, 2))
    shards = output / UNFINISHED / "another-node.1.part1" / "shards"
    shards.mkdir(parents=True)
    (shards / "shard.tar").write_bytes(b"half")
    shards.parent.with_name(f"{shards.parent.name}.lock").touch()
    scandir, seen = os.scandir, []

    def vanishing(path="."):
        if str(path) == str(shards) and not seen:
            seen.append(path)
            shutil.rmtree(shards.parent)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    job(corpus, output, partition=(1, 2))
    assert seen


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "web.jsonl"
    path.write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(60_000)))
    return path


def start(source: Path, output: Path, *more) -> subprocess.Popen:
    """A run that is inside its splits."""
    arguments = command("--input", source, "--format", "documents", "--output", output, *more)
    process = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    while not list(output.glob(f"{UNFINISHED}/*/shards/.*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_unfinished(documents, tmp_path, workers, number):
    output, options = tmp_path / "set", ("--shard-size", 10_000, "--workers", workers)
    process = start(documents, output, *options)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to all processes
    else:
        process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "interrupted; finished splits are kept" in text and "Traceback" not in text
    assert not list((output / UNFINISHED).iterdir())
    assert not (output / "manifest.json").exists()


def test_a_killed_run_takes_its_workers_along_and_continues(documents, tmp_path):
    output, options = tmp_path / "set", ("--shard-size", 10_000, "--workers", 2)
    process = start(documents, output, *options)
    process.kill()
    process.wait()
    wait_until(lambda: group_is_gone(process.pid))
    assert list((output / UNFINISHED).iterdir())
    assert "kept 60000" in succeeded(tool(documents, "documents", output, *options))
    assert not list((output / UNFINISHED).iterdir())


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path[:0] = ["tests"]
from preprocess_run import job, pairs
resource.setrlimit(resource.RLIMIT_FSIZE, (9000,) * 2)
job(pairs(splits=3, size=8), Path(sys.argv[1]), workers=int(sys.argv[2]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path, workers):
    output = tmp_path / "set"
    script = tmp_path / "full.py"
    script.write_text(f"if __name__ == '__main__':{FULL_DISK.replace(chr(10), chr(10) + '    ')}")
    result = subprocess.run(
        [sys.executable, script, output, str(workers)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    assert result.returncode == 1
    assert "PreprocessError: split part" in result.stderr and "File too large" in result.stderr
    assert not list(output.glob("*.tar*")) and not list((output / UNFINISHED).iterdir())
    corpus = pairs(splits=3, size=8)
    assert job(corpus, output).report.kept == 24
    job(corpus, tmp_path / "at once/set")
    assert tree(output) == tree(tmp_path / "at once/set")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["preprocess/job.json", "preprocess/parts/part0.json"])
def test_damaged_files_of_a_job_are_named(corpus, tmp_path, name, damage):
    output = tmp_path / "set"
    job(corpus, output, partition=(0, 2))
    (output / name).write_bytes(damage)
    with pytest.raises(
        PreprocessError, match=f"{name} is damaged; delete {output} and start again"
    ):
        job(corpus, output)


def test_a_damaged_report_of_a_finished_job_is_named(corpus, tmp_path):
    job(corpus, tmp_path / "set")
    for damage in (b"{", b"[]", b'{"kept": 1}'):
        (tmp_path / "set/report.json").write_bytes(damage)
        with pytest.raises(PreprocessError, match="report.json is damaged"):
            job(corpus, tmp_path / "set")
