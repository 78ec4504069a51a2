"""slurm/preprocess.sh with an sbatch that runs what it is given at once, and the real tool."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from preprocess_run import ENVIRONMENT, ROOT, keys, succeeded, tool, tree

pytestmark = pytest.mark.slurm

# Runs an array task by task and what depends on a failed job not at all, as Slurm does; keeps a
# record of every submission, and fails one task if told to.
SBATCH = """#!{python}
import json, os, subprocess, sys
from pathlib import Path
script = sys.stdin.read()
state = Path(os.environ["FAKE_SLURM"])
options = dict(o.lstrip("-").partition("=")[::2] for o in sys.argv[1:])
jobs = [json.loads(line) for line in (state / "jobs").read_text().splitlines()]
job = {{"id": str(100 + len(jobs)), "options": options, "ran": [], "ok": True}}
if "dependency" in options:
    kind, needed = options["dependency"].split(":")
    assert kind == "afterok"
    job["ok"] = next(other["ok"] for other in jobs if other["id"] == needed)
if job["ok"]:
    first, last = options.get("array", "-1--1").split("-", 1) if "array" in options else (0, 0)
    for task in range(int(first), int(last) + 1):
        environment = os.environ | {{"SLURM_CPUS_PER_TASK": "1"}}
        if "array" in options:
            environment["SLURM_ARRAY_TASK_ID"] = str(task)
        if os.environ.get("FAIL") == f"{{job['id']}}.{{task}}":
            status = 1
        else:
            with open(state / "log", "a") as log:
                status = subprocess.call(
                    [script.splitlines()[0][2:], "-c", script],
                    env=environment, cwd=options["chdir"], stdout=log, stderr=log,
                )
        job["ran"].append([task, status])
        job["ok"] = job["ok"] and status == 0
with open(state / "jobs", "a") as file:
    print(json.dumps(job), file=file)
print(f"{{job['id']}};cluster")
"""


@pytest.fixture
def slurm(tmp_path):
    """Submits; gives the exit status, what was printed and all jobs so far."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (folder / "sbatch").chmod(0o755)
    (tmp_path / "jobs").touch()

    def submit(*arguments, **more):
        path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", str(ROOT / "slurm/preprocess.sh"), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=ENVIRONMENT | {"FAKE_SLURM": str(tmp_path), "PATH": path} | more,
        )
        jobs = [json.loads(line) for line in (tmp_path / "jobs").read_text().splitlines()]
        return result.returncode, result.stdout + result.stderr, jobs

    return submit


@pytest.fixture
def corpus(tmp_path):
    """30 texts, 20 of them different, in a file whose name a shell would take apart."""
    path = tmp_path / "my corpus $(x).jsonl"
    lines = [json.dumps({"text": f"text {number % 20}"}) for number in range(30)]
    path.write_text("\n".join(lines))
    return path


def test_one_reading_is_an_array_and_a_merge(slurm, corpus, tmp_path):
    options = ["--input", corpus.name, "--format", "documents", "--shard-size", 10]
    status, text, jobs = slurm(8, "--time=1:00", "--", *options, "--output", "out/set")
    assert status == 0, text
    array, merge = jobs
    assert [task for task, _ in array["ran"]] == [0, 1, 2] and array["options"]["time"] == "1:00"
    assert merge["options"]["dependency"] == "afterok:100" and merge["ok"]
    assert merge["options"]["kill-on-invalid-dep"] == "yes" and "array" not in merge["options"]
    succeeded(tool(corpus, "documents", tmp_path / "alone/set", "--shard-size", 10))
    assert tree(tmp_path / "out/set").keys() == tree(tmp_path / "alone/set").keys()
    assert keys(tmp_path / "out/set") == keys(tmp_path / "alone/set")


def test_two_readings_are_two_arrays_and_two_merges_and_failures_stop_the_chain(
    slurm, corpus, tmp_path
):
    options = ["--input", corpus, "--format", "documents", "--shard-size", 10]
    options += ["--output", tmp_path / "set", "--deduplicate", "pair", "--sample", "7"]
    status, text, jobs = slurm(2, "--", *options, FAIL="100.1")
    assert status == 0, text
    assert [len(job["ran"]) for job in jobs] == [2, 0, 0, 0]
    assert [job["ok"] for job in jobs] == [False] * 4
    assert not (tmp_path / "set/manifest.json").exists()
    status, text, jobs = slurm(2, "--", *options)
    assert [job["ok"] for job in jobs[4:]] == [True] * 4, (tmp_path / "log").read_text()
    assert len(keys(tmp_path / "set")) == 7


def test_wrong_use_is_refused_before_anything_is_submitted(slurm, corpus, tmp_path):
    good = ["--input", corpus, "--format", "documents", "--output", tmp_path / "set"]
    for arguments, expected in (
        ([], "number of partitions"),
        (["0", "--", *good], "number of partitions"),
        (["x", "--", *good], "not 'x'"),
        ([4, *good], "-- must stand"),
        ([4, "--time=1"], "-- must stand"),
        ([4, "--array=1-2", "--", *good], "--array=1-2 is set by this script"),
        ([4, "--", *good, "--merge"], "--merge is set by this script"),
        ([4, "--", *good, "--partition=0/2"], "is set by this script"),
        ([4, "--", *good, "--min-sides", 3], "unrecognized arguments"),
        ([4, "--", *good[:-2]], "--output"),
        ([4, "--", "--input", "nowhere", *good[2:]], "nowhere does not exist"),
    ):
        status, text, jobs = slurm(*arguments)
        assert status != 0 and expected in text and not jobs, (arguments, text)
    assert not (tmp_path / "set").exists()
