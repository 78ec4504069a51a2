"""A recipe from tables as published to the configuration for training: tools/build_mixture.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tool
import yaml
from paths import HELPERS, ROOT
from preprocess_run import records
from tiny_data import encoded, make_image

from data_prep.downloads.mixture import Mixture
from data_prep.downloads.recipe import Recipe, Source, read_recipe
from megatron_owl2.config.load import load_config
from megatron_owl2.errors import PreprocessError

pytestmark = pytest.mark.slow

RECIPE = {
    "extends": "base.yaml",
    "seed": 7,
    "shard_size": 20,
    "sources": {
        "small": {
            "corpus": "cc3m",
            "metadata": "metadata/cc3m.tsv",
            "target": 30,
            "expected": 0.75,
            "shards": {"deduplicate": "pair"},
        },
        "large": {
            "corpus": "laion",
            "metadata": "metadata/laion",
            "target": 50,
            "expected": 0.5,
            "list": {"min_score": {"similarity": 0.35}, "max_score": {"punsafe": 0.5}},
            "shards": {"min_side": 16, "max_aspect": 3},
        },
        "coco": {
            "format": "coco",
            "input": "coco/captions.json",
            "images": "coco/images",
            "target": 20,
        },
    },
}


def url(number: int) -> str:
    """Every fourth address is dead."""
    return f"http://x/{'gone' if number % 4 == 0 else 'there'}/{number}.jpg"


@pytest.fixture
def folder(tmp_path):
    """A mixture's folder with everything the user brings, and the recipe beside it."""
    folder = tmp_path / "mixture"
    (folder / "metadata/laion").mkdir(parents=True)
    (folder / "coco/images").mkdir(parents=True)
    lines = [f"caption {i}\t{url(i)}\n" for i in range(60)]
    (folder / "metadata/cc3m.tsv").write_text("".join(lines))
    for part in range(2):
        numbers = range(100 * part, 100 * part + 100)
        columns = {
            "URL": [url(i) for i in numbers],
            "TEXT": [f"laion {i}" for i in numbers],
            "similarity": [0.3 + (i % 100) / 500 for i in numbers],
            "punsafe": [0.1] * 100,
        }
        pq.write_table(pa.table(columns), folder / f"metadata/laion/{part}.parquet")
    content = {"images": [], "annotations": []}
    for number in range(5):
        (folder / f"coco/images/{number}.jpg").write_bytes(encoded(make_image(number)))
        content["images"].append({"id": number, "file_name": f"{number}.jpg"})
        content["annotations"] += [
            {"id": 5 * number + k, "image_id": number, "caption": f"coco {k}"} for k in range(5)
        ]
    (folder / "coco/captions.json").write_text(json.dumps(content))
    write_recipe(tmp_path, RECIPE)
    (tmp_path / "base.yaml").write_text("data: {sequence_length: 99}\n")
    program = tmp_path / "bin/img2dataset"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {HELPERS}/fake_img2dataset.py "$@"\n')
    program.chmod(0o755)
    return folder


def write_recipe(tmp_path: Path, recipe: dict) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def build(folder: Path, *arguments) -> subprocess.CompletedProcess:
    recipe = folder.parent / "recipe.yaml"
    with pytest.MonkeyPatch.context() as patch:  # for the steps, which are processes
        patch.setenv("PATH", f"{folder.parent / 'bin'}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", f"{ROOT}:{HELPERS}")
        return tool.run("build_mixture", "--folder", folder, "--recipe", recipe, *arguments)


def table(text: str) -> dict[str, list[str]]:
    """The cells of the table by source."""
    lines = [line.split("  ") for line in text[text.index("source  ") :].splitlines()[:4]]
    return {line[0].strip(): [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}


def test_a_tiny_mixture_from_tables_to_the_configuration(folder):
    looked = build(folder)
    assert looked.returncode == 0, looked.stderr
    assert table(looked.stdout)["large"] == ["0", "0", "0", "50"]
    assert "small: next: list" in looked.stdout and "coco: next: shards" in looked.stdout
    assert not (folder / "lists").exists() and "the mixture is ready" not in looked.stdout

    made = build(folder, "--run", "--only", "small")
    assert made.returncode == 0, made.stderr
    assert build(folder, "--run", "--only", "coco").returncode == 0
    looked = build(folder).stdout
    assert table(looked)["small"] == ["40", "31", "30", "30"]  # 31 of the 40 addresses drawn answer
    assert table(looked)["coco"] == ["-", "-", "20", "20"]
    assert "small: ready\n" in looked and "large: next: list" in looked

    made = build(folder, "--run")
    assert made.returncode == 0, made.stderr
    # 150 rows are similar enough, 100 of them drawn, of which 75 answer and 50 are kept.
    assert table(build(folder).stdout)["large"][0] == "100"
    assert f"the mixture is ready: {folder}/config.yaml" in made.stdout
    found = load_config(folder / "config.yaml", [])
    assert found.data.sequence_length == 99
    assert [(s.path, s.weight) for s in found.data.sources] == [
        (str(folder / "shards/small"), 0.3),
        (str(folder / "shards/large"), 0.5),
        (str(folder / "shards/coco"), 0.2),
    ]
    large = records(folder / "shards/large")
    assert len(large) == 50 and {r.source for r in large} == {"large"}
    assert all(r.metadata["similarity"] >= 0.35 and "there" in r.metadata["url"] for r in large)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}
    again = build(folder, "--run")
    assert again.returncode == 0 and "large, download" not in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}


def test_a_download_that_stops_is_continued(folder):
    assert build(folder, "--run", "--only", "small").returncode == 0
    shutil.rmtree(folder / "shards")
    (folder / "pictures/small/00001_stats.json").unlink()
    kept = (folder / "pictures/small/00000.tar").stat().st_mtime_ns
    looked = build(folder).stdout
    assert table(looked)["small"][1].endswith("(1 of 2 shards)")
    assert "small: next: download\n    bash" in looked
    assert build(folder, "--run", "--only", "small").returncode == 0
    assert (folder / "pictures/small/00000.tar").stat().st_mtime_ns == kept
    assert table(build(folder).stdout)["small"] == ["40", "31", "30", "30"]


@pytest.mark.parametrize("gone", ["pictures/small", "pictures/small/00001_stats.json", "lists"])
def test_a_source_that_is_ready_needs_no_raw_data(folder, gone):
    assert build(folder, "--run", "--only", "small").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "shards").rglob("*")}
    (folder / "metadata/cc3m.tsv").unlink()
    path = folder / gone
    path.unlink() if path.is_file() else shutil.rmtree(path)
    (folder.parent / "bin/img2dataset").write_text("#!/bin/sh\nexit 3\n")
    again = build(folder, "--run", "--only", "small")
    assert again.returncode == 0 and "small: ready" in again.stdout, again.stderr
    assert "small, " not in again.stdout and not (path.exists() and path.is_dir())
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "shards").rglob("*")}
    assert build(folder, "--run", "--only", "coco").returncode == 0
    shutil.rmtree(folder / "coco")
    again = build(folder, "--run", "--only", "coco")
    assert again.returncode == 0 and "coco: ready" in again.stdout, again.stderr


def test_a_download_is_not_begun_again_behind_its_shards(folder):
    """What is held out later must be of the images that the shards were made of."""
    write_recipe(folder.parent, RECIPE | {"hold_out": 5})
    assert build(folder, "--run", "--only", "small").returncode == 0
    shutil.rmtree(folder / "pictures")
    shutil.rmtree(folder / "validation")
    made = build(folder, "--run", "--only", "small")
    assert made.returncode == 1 and "small: the step 'shards' failed" in made.stderr
    assert "small, download" not in made.stdout and not (folder / "pictures").exists()


def test_failures_are_named_and_the_rest_goes_on(folder):
    (folder / "metadata/cc3m.tsv").unlink()
    (folder.parent / "bin/img2dataset").write_text("#!/bin/sh\nexit 3\n")
    made = build(folder, "--run")
    assert made.returncode == 1 and "not finished: small, large" in made.stderr
    assert f"small: bring {folder}/metadata/cc3m.tsv (Train_GCC" in made.stderr
    assert "large: the step 'download' failed" in made.stderr
    assert "coco: ready" in made.stdout and not (folder / "config.yaml").exists()
    assert "sources are small, large, coco" in build(folder, "--only", "x").stderr


def test_a_changed_recipe_does_not_mix_with_what_is_there(folder):
    assert build(folder, "--run", "--only", "small").returncode == 0
    source = RECIPE["sources"]["small"]
    for changes in ({"expected": 0.8}, {"shards": {"deduplicate": "image"}}):
        recipe = RECIPE | {"sources": {"small": source | changes}}
        write_recipe(folder.parent, recipe)
        made = build(folder, "--run")
        assert made.returncode == 1 and "not finished: small" in made.stderr, changes


def test_a_source_that_falls_short_says_so(folder):
    source = RECIPE["sources"]["small"] | {"target": 44, "expected": 1.0}
    write_recipe(folder.parent, RECIPE | {"sources": {"small": source}})
    made = build(folder, "--run")
    assert made.returncode == 0, made.stderr
    kept = int(table(made.stdout)["small"][2])
    assert 20 < kept < 44
    assert f"ready with {kept / 44:.1%} of the target; a lower 'expected'" in made.stdout


def changed(path: str, value) -> dict:
    recipe = json.loads(json.dumps(RECIPE))
    *sections, last = path.split(".")
    tree = recipe
    for section in sections:
        tree = tree[section]
    tree[last] = value
    return recipe


_COCO = {"target": 1, "format": "coco", "input": "x"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sead", 1, "unknown key 'sead'; did you mean 'seed'"),
        ("seed", "x", "'x' of type 'str' could not be converted to Integer (key seed)"),
        ("sources", {}, "sources must be a section"),
        ("sources", {"": _COCO}, "the name '' in sources must be the name of a folder"),
        ("sources", {"../x": _COCO}, "the name '../x' in sources must be the name of a folder"),
        (
            "sources.small.taget",
            1,
            "'sources.small.taget'; did you mean 'sources.small.target'",
        ),
        ("sources.small.target", 0, "sources.small.target must be above 0"),
        (
            "sources.small.target",
            1.5,
            "not be converted to Integer (key sources.small.target)",
        ),
        ("sources.small.expected", 0, "a share above 0"),
        ("sources.small.corpus", "cc4m", "sources.small.corpus must be cc3m or"),
        ("sources.small.metadata", None, "sources.small.metadata must be the path"),
        ("sources.small.input", "x", "sources.small.input must be absent"),
        (
            "sources.large.list.min_scores",
            {},
            "unknown key 'sources.large.list.min_scores'; did",
        ),
        ("sources.large.shards.sample", 3, "unknown key 'sources.large.shards.sample'; known"),
        ("sources.coco.format", "jpg", "sources.coco.format must be alpaca or"),
        ("sources.coco.input", None, "sources.coco.input must be a path"),
        ("sources.coco.list", {"min_side": 3}, "sources.coco.list must be absent"),
        ("sources.coco", 3, "'sources.coco' is a section, not 3"),
    ],
)
def test_what_no_recipe_can_hold(tmp_path, path, value, message):
    with pytest.raises(PreprocessError, match=re.escape(message)):
        read_recipe(write_recipe(tmp_path, changed(path, value)))


def test_a_recipe_needs_a_target(tmp_path):
    recipe = changed("sources.small", {"corpus": "cc3m", "metadata": "x"})
    with pytest.raises(PreprocessError, match="recipe.yaml: 'sources.small.target' is missing"):
        read_recipe(write_recipe(tmp_path, recipe))
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(PreprocessError, match="recipe.yaml is not valid YAML"):
        read_recipe(tmp_path / "recipe.yaml")


def test_the_recipe_of_the_paper():
    recipe = read_recipe(ROOT / "examples/mixture.yaml")
    assert list(recipe.sources) == ["cc3m", "cc12m", "coco", "laion", "coyo", "datacomp"]
    assert sum(source.target for source in recipe.sources.values()) == 400_000_000
    rows = {"cc3m": 3_318_333, "cc12m": 12_423_374, "coyo": 746_972_269}
    for name, count in rows.items():
        assert recipe.sources[name].target / recipe.sources[name].expected < count
    assert (ROOT / "examples" / recipe.extends).is_file()


def test_steps_hold_every_option_of_the_recipe(tmp_path):
    source = Source(
        10,
        "laion",
        "tables",
        list={"only": {"NSFW": ["UNLIKELY", "UNSURE"]}, "min_side": 64},
        shards={"min_score": {"similarity": 0.3, "aesthetic": 4.5}, "max_side": 448},
    )
    mixture = Mixture(Recipe({"a": source}, seed=3, image_size=448, shard_size=5), tmp_path)
    steps = {name: " ".join(command) for name, command in mixture.steps("a", 6).items()}
    assert "--only NSFW=UNLIKELY,UNSURE --min-side 64 --sample 10 --seed 3" in steps["list"]
    assert steps["list"].endswith("--image-size 448 --shard-size 5")
    assert steps["download"] == f"bash {tmp_path}/lists/a/download.sh {tmp_path}/pictures/a"
    assert "--min-score similarity=0.3 --min-score aesthetic=4.5 --max-side 448" in steps["shards"]
    assert steps["shards"].endswith("--sample 10 --seed 3 --shard-size 5 --workers 6")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"groups": {"text": 8}}, r"sources\.a\.group must be one of config\.data\.groups: text"),
        ({"group": "text"}, r"sources\.a\.group must be one of .*: absent without"),
        ({"group": "text", "groups": {"text": 7}}, "data.groups adds up to 7 samples of a batch"),
        (
            {"group": "text", "groups": {"text": 8}, "packing": True},
            "data.groups counts samples, of which a packed row has several",
        ),
        ({"tokenization": "official_train"}, "looks for the words of model.template owl1"),
        (
            {"tokenization": "official_inference", "template": "owl1"},
            "official_inference asks only",
        ),
    ],
)
def test_what_training_would_refuse_is_refused_at_once(recipe, message, tmp_path):
    data = {key: recipe.pop(key) for key in ("groups", "packing") if key in recipe}
    source = {"format": "alpaca", "input": "a.json", "target": 5}
    source |= {key: recipe.pop(key) for key in ("group",) if key in recipe}
    (tmp_path / "base.yaml").write_text("train: {global_batch_size: 8, micro_batch_size: 1}\n")
    tree = {"extends": "base.yaml", "sources": {"a": source}, "config": {"data": data}, **recipe}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(PreprocessError, match=message):
        read_recipe(tmp_path / "recipe.yaml")
