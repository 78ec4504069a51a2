"""The recipe of instruction tuning: counts of the paper, held-out samples, the configuration."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from preprocess_run import records
from tiny_data import encoded, make_image

from data_prep.downloads.mixture import Mixture
from data_prep.downloads.recipe import read_recipe
from megatron_owl2.config.load import load_config
from megatron_owl2.data.tokenizer import train_tokenizer
from megatron_owl2.errors import PreprocessError

TABLE_14 = {
    "sharegpt": 40,
    "slimorca": 518,
    "llava": 158,
    "coco": 82,
    "textcaps": 22,
    "vqav2": 83,
    "gqa": 72,
    "okvqa": 9,
    "ocrvqa": 80,
    "aokvqa": 50,
    "refcoco": 30,
    "visual_genome": 86,
}


def test_the_recipe_of_the_paper_has_its_counts(tmp_path):
    recipe = read_recipe(ROOT / "examples/instructions.yaml")
    found = {name: source.target for name, source in recipe.sources.items()}
    assert found == {name: 1000 * count for name, count in TABLE_14.items()}
    assert sum(found.values()) == 1_230_000
    steps = Mixture(recipe, tmp_path).steps("coco", 3)
    assert list(steps) == ["shards", "validation"]
    for name, kind in (("shards", "shards"), ("validation", "validation")):
        line = " ".join(steps[name])
        assert f"--images {tmp_path}/coco/train2014 --output {tmp_path}/{kind}/coco" in line
        assert f"--hold-out 200 --tokenizer {tmp_path}/tokenizer.model --template owl2" in line
        assert "--template owl2 --tokenization turns" in line
    assert steps["shards"][-8:-2] == [
        "--sample",
        "82000",
        "--seed",
        "1234",
        "--shard-size",
        "10000",
    ]
    assert steps["validation"][-1] == "--only-held-out"


def test_the_recipe_of_version_1_has_its_counts_and_halves_of_a_step(tmp_path):
    recipe = read_recipe(ROOT / "examples/owl1_instructions.yaml")
    found = {name: (s.format, s.group, s.target) for name, s in recipe.sources.items()}
    assert found == {
        "alpaca": ("alpaca", "text", 102_000),
        "vicuna": ("conversations", "text", 90_000),
        "baize": ("baize", "text", 50_000),
        "llava": ("conversations", "multimodal", 150_000),
    }
    assert recipe.config["data"]["groups"] == {"text": 128, "multimodal": 128}
    assert recipe.config["train"]["global_batch_size"] == 256
    steps = Mixture(recipe, tmp_path).steps("baize", 3)
    line = " ".join(steps["shards"])
    assert f"--input {tmp_path}/baize/quora_chat_data.json --format baize" in line
    assert "--template owl1" in line and "--sample 50000" in line


def test_a_source_takes_its_group_into_the_configuration(folder):
    path = folder.parent / "recipe.yaml"
    tree = yaml.safe_load(path.read_text()) | {"hold_out": 0, "weights": "targets"}
    tree["config"] = {
        "data": {"groups": {"text": 3, "images": 5}},
        "train": {"global_batch_size": 8},
    }
    tree["sources"]["talk"]["group"] = "text"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(
        PreprocessError,
        match="sources.captions.group must be one of config.data.groups: images or text",
    ):
        read_recipe(path)
    tree["sources"]["captions"]["group"] = "images"
    path.write_text(yaml.safe_dump(tree))
    for name in ("captions", "talk"):
        (folder / "shards" / name).mkdir(parents=True)
        (folder / "shards" / name / "manifest.json").write_text('{"samples": 15}')
    found = load_config(Mixture(read_recipe(path), folder).write_config(path), []).data
    assert found.groups == {"text": 3, "images": 5}
    assert [(s.group, s.weight) for s in found.sources] == [("images", 0.4), ("text", 0.6)]


@pytest.fixture
def folder(tmp_path):
    """A mixture of two sources, one with a sample that cannot be used."""
    folder = tmp_path / "mixture"
    (folder / "images").mkdir(parents=True)
    content = {"images": [], "annotations": []}
    for number in range(12):
        (folder / f"images/{number}.jpg").write_bytes(encoded(make_image(number)))
        content["images"].append({"id": number, "file_name": f"{number}.jpg"})
        caption = {"id": number, "image_id": number, "caption": f"caption {number}"}
        content["annotations"].append(caption)
    (folder / "captions.json").write_text(json.dumps(content))
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    entries = [json.dumps({"id": number, "conversations": talk}) for number in range(20)]
    (folder / "talk.jsonl").write_text("\n".join([*entries, "{"]))
    train_tokenizer(
        ["Provide a one-sentence caption: Hello, Hi 0123456789"] * 9, folder / "t.model", 320
    )
    recipe = {
        "extends": "base.yaml",
        "hold_out": 3,
        "weights": "samples",
        "tokenizer": "t.model",
        "template": "vicuna_v1",
        "config": {
            "data": {"packing": True},
            "train": {"epochs": 1},
            "validation": {"interval": 5},
        },
        "sources": {
            "captions": {
                "format": "coco-instruction",
                "input": "captions.json",
                "images": "images",
                "target": 10,
            },
            "talk": {"format": "conversations", "input": "talk.jsonl", "target": 15},
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (tmp_path / "base.yaml").write_text(
        "data: {sequence_length: 99}\nmodel: {decoder: {num_layers: 2}}\n"
    )
    return folder


def build(folder: Path, *arguments) -> str:
    command = [sys.executable, ROOT / "tools/build_mixture.py", "--folder", folder]
    command += ["--recipe", folder.parent / "recipe.yaml", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_mixture_holds_samples_out_and_says_what_it_lost(folder):
    made = build(folder, "--run")
    rows = {line.split()[0]: line.split()[1:] for line in made.splitlines() if "    " in line}
    assert rows["captions"] == ["-", "-", "9", "10", "3"]
    assert rows["talk"] == ["-", "-", "15", "15", "3"]
    assert rows["total"] == ["24", "25", "6"]
    lost = made[made.index("captions: ready with 90.0% of the target") :]
    assert "    3 x held out\n" in lost[: lost.index("talk: ready")]
    talk = lost[lost.index("talk: ready\n") :]
    for line in ("1 x line is not JSON", "2 x not in the sample", "3 x held out"):
        assert f"    {line}\n" in talk

    for name in ("captions", "talk"):
        kept, held = (records(folder / kind / name) for kind in ("shards", "validation"))
        assert len(held) == 3 and not {r.key for r in held} & {r.key for r in kept}
    found = load_config(folder / "config.yaml", [])
    assert [(s.path, s.weight) for s in found.data.sources] == [
        (str(folder / "shards/captions"), 0.0),
        (str(folder / "shards/talk"), 0.0),
    ]
    assert found.validation.sources == [
        str(folder / f"validation/{n}") for n in ("captions", "talk")
    ]
    assert (found.validation.interval, found.train.epochs, found.data.packing) == (5, 1, True)
    assert (found.data.sequence_length, found.model.template) == (99, "vicuna_v1")
    assert found.data.tokenizer == str(folder / "t.model")
    assert f"the mixture is ready: {folder}/config.yaml" in made


def test_a_source_is_not_ready_before_its_samples_are_held_out(folder):
    mixture = Mixture(read_recipe(folder.parent / "recipe.yaml"), folder)
    (folder / "shards/talk").mkdir(parents=True)
    (folder / "shards/talk/manifest.json").write_text('{"samples": 15}')
    state = mixture.state("talk")
    assert not state.ready and mixture.next_step("talk", state) == "validation"
    assert mixture.advice("talk", state) == "next: validation"
    with pytest.raises(PreprocessError, match="not ready yet: captions, talk"):
        mixture.write_config(folder.parent / "recipe.yaml")
    (folder / "t.model").unlink()
    assert mixture.missing("talk") == f"bring {folder}/t.model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hold_out": -1}, "hold_out must be 0 or more"),
        ({"weights": "equal"}, "weights"),
        ({"template": "v2"}, "template"),
        ({"config": {"data": {"pack": True}}}, "recipe.yaml, config: unknown key 'data.pack'"),
    ],
)
def test_what_no_recipe_can_hold(folder, change, message):
    path = folder.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(PreprocessError, match=message):
        read_recipe(path)
