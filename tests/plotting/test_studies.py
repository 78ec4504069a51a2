"""The tables of the studies: means and spreads over the seeds; every run they name is made."""

import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from paths import EXAMPLES
from PIL import Image

from megatron_owl2.config.load import load_config

STUDIES = EXAMPLES / "studies"


@pytest.fixture(scope="module")
def tables() -> dict:
    return runpy.run_path(str(STUDIES / "tables.py"))


def runs_of_the_script() -> list[list[str]]:
    """Name, variant of stage 1 and settings of stage 2 of every run of tables.sh."""
    (listed,) = re.findall(r'^RUNS="(.*?)"$', (STUDIES / "tables.sh").read_text(), re.M | re.S)
    return [line.split() for line in listed.splitlines()]


def test_the_tables_show_the_runs_that_the_script_makes(tables):
    shown = {run for table in tables["TABLES"] for run, _ in table.rows.values()}
    assert shown == {name for name, *_ in runs_of_the_script()}


@pytest.mark.parametrize("run", runs_of_the_script(), ids=lambda run: run[0])
def test_every_run_changes_what_its_table_is_about(run):
    name, first, *second = run
    folder = STUDIES / "tables"
    stages = {
        stage: load_config(
            folder / f"{stage}.yaml",
            [str(folder / f"{file}.yaml") for file in files if file != "base"],
        )
        for stage, files in (("pretrain", [first]), ("finetune", second))
    }
    for stage, config in stages.items():
        base = load_config(folder / f"{stage}.yaml")
        assert (config.model.decoder.modality_split == []) == name.startswith("no_split")
        assert ("vision_model.*" in config.stage.frozen) == (name == "frozen_vit")
        decay = config.optimizer.vision_layer_decay
        assert decay == (0.53 if name == "layer_decay" else 1.0)
        queries = int(name.split("_")[1]) if name.startswith("queries") else 16
        assert config.model.abstractor.num_queries == queries
        assert config.train == base.train
    pixels = int(name.split("_")[1]) if name.startswith("resolution") else 56
    assert stages["pretrain"].model.vision.image_size == 56
    assert stages["finetune"].model.vision.image_size == pixels
    sources = {source.path.removeprefix("shards/") for source in stages["finetune"].data.sources}
    images = {"questions", "captions", "two_images"}
    if name.endswith("text"):
        assert sources == {"text"}
    else:
        assert sources == (images if name.endswith("multimodal") else images | {"text"})


# In place of Python and torchrun: what they are called with becomes a line of calls.
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
[[ "$*" != *"train.output=${FAILING:-none} "* ]]
"""


def test_the_script_makes_every_run_once_and_stops_where_one_fails(tmp_path):
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    calls, binaries, quickstart = (tmp_path / name for name in ("calls", "venv/bin", "quickstart"))
    (tmp_path / "examples/environment.sh").write_text(
        f"ROOT={tmp_path} VENV={binaries.parent}\nfail() {{ echo $* >&2; exit 1; }}\n"
    )
    for folder in (binaries, quickstart / "done", quickstart / "start"):
        folder.mkdir(parents=True)
    (quickstart / "done/parts").touch()
    for name in ("python", "torchrun"):
        (binaries / name).write_text(STAND_IN)
        (binaries / name).chmod(0o755)

    def tables_sh(failing: str = "none") -> tuple[subprocess.CompletedProcess, list[str]]:
        """The finished process, and the settings and output of every run that it called for."""
        calls.write_text("")
        done = subprocess.run(
            ["bash", tmp_path / "examples/studies/tables.sh", quickstart],
            env={"PATH": "/usr/bin:/bin", "CALLS": str(calls), "FAILING": failing, "SEEDS": "1 2"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        trained = [line for line in calls.read_text().splitlines() if line.startswith("torchrun")]
        settings = (re.findall(r"tables/(\w+)\.yaml|train\.output=(\S+)", line) for line in trained)
        return done, [" ".join(file or run for file, run in found) for found in settings]

    done, made = tables_sh(failing="runs/no_split-1")
    assert " no_split-2\n" in done.stdout
    assert done.returncode and " no_split-1\n" not in done.stdout
    wanted = set()
    for seed in "12":
        for name, first, *second in runs_of_the_script():
            stage_1 = " ".join(["pretrain", *([first] if first != "base" else [])])
            wanted.add(f"{stage_1} runs/pretrain-{first}-{seed}")
            wanted.add(f"{' '.join(['finetune', *second])} runs/{name}-{seed}")
    assert len(made) == len(set(made)) and set(made) == wanted
    asked = calls.read_text()
    assert "scores/no_split-2-text" in asked and "scores/no_split-1-" not in asked
    assert "tables.py" not in asked

    done, made = tables_sh()
    assert done.returncode == 0, done.stderr
    assert made == ["finetune no_split runs/no_split-1"]
    assert "tables.py . 1 2" in calls.read_text()


@pytest.mark.parametrize("control", ["dialogues_alone", "mixed"])
def test_a_language_start_for_comparison_begins_from_nothing_with_as_many_rows(control):
    config = load_config(STUDIES / f"{control}.yaml")
    assert config.stage.initial_checkpoint is None
    rows = config.train.steps * config.train.global_batch_size
    stages = [load_config(EXAMPLES / f"tiny/{name}.yaml").train for name in ("text", "chat")]
    assert rows == sum(stage.steps * stage.global_batch_size for stage in stages)


def test_means_and_spreads_are_those_of_the_scores(tables, tmp_path, monkeypatch, capsys):
    values = itertools.count(10)
    expected = {}
    for run, *_ in runs_of_the_script():
        for name in ("seen", "heldout", "text"):
            for seed in "12":
                folder = tmp_path / f"scores/{run}-{seed}-{name}"
                folder.mkdir(parents=True)
                accuracy = next(values) * 1.0
                expected.setdefault((run, name), []).append(accuracy)
                overall = {"accuracy": accuracy, "n": 1234}
                (folder / "scores.json").write_text(json.dumps({"overall": overall}))
    monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path), "1 2"])
    assert tables["main"]() == 0
    written = (tmp_path / "tables.md").read_text()
    assert capsys.readouterr().out == written
    assert written.count("new images (1,234) | held-out pairs (1,234) | texts (1,234)") == 4
    assert "| split, joint | 10.5 ± 0.7 | 12.5 ± 0.7 | 14.5 ± 0.7 | best on both |" in written
    assert "| 16 | 10.5 ± 0.7 | 12.5 ± 0.7 | 14.5 ± 0.7 | 76.8 |" in written
    assert "over 2 seeds" in written.splitlines()[-1]
    found = json.loads((tmp_path / "tables.json").read_text())
    for (run, name), accuracies in expected.items():
        assert found[run][name] == accuracies
    assert Image.open(tmp_path / "tables.png").width > 800
    monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path), "1 3"])
    with pytest.raises(FileNotFoundError, match="-3-seen"):
        tables["main"]()
