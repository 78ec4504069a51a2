"""Validation loss: its definition, the same under every parallel configuration, and its traces."""

import json

import faults
import pytest
import runs_in_turn
import tiny_data
import tiny_run
import torch

from megatron_owl2.config.load import load_config
from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.data.validation_dataset import ValidationDataset
from megatron_owl2.inference.loading import load_model
from megatron_owl2.mcore import setup

pytestmark = pytest.mark.distributed

SAMPLES = 13  # no multiple of any number of ranks or rows
ONE = "train.micro_batch_size=1"
CONFIGURATIONS = {
    2: {
        "TP 2 SP": ["parallel.tensor=2", "parallel.sequence=true"],
        "VP 2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        "CP 2": ["parallel.context=2"],
        "DP 2": [ONE],
    },
    4: {
        "PP 2 DP 2": ["parallel.pipeline=2", ONE],
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two steps, by configuration: one process with and without validation, and others
    that start from the same weights."""
    folder = tmp_path_factory.mktemp("validation")
    config = tiny_run.make(folder, 2)
    held_out = [tiny_data.record(100 + index) for index in range(20)]
    tiny_data.write(folder / "held out", held_out)
    texts = [record for record in held_out if not record.images]
    tiny_data.write(folder / "texts", texts)
    start = [f"stage.initial_checkpoint={folder / 'initial'}"]
    options = [
        *start,
        f"validation.sources=['{folder / 'held out'}','{folder / 'texts'}']",
        "validation.interval=1",
        f"validation.samples={SAMPLES}",
    ]
    launches = {1: {"initial": ["train.steps=1"], "none": start, "one": options}}
    for processes, configurations in CONFIGURATIONS.items():
        launches[processes] = {n: [*options, *more] for n, more in configurations.items()}
    for processes, overrides in launches.items():
        wanted = [(folder / name, overrides[name]) for name in overrides]
        done = runs_in_turn.launch(config, wanted, processes)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", [name for group in CONFIGURATIONS.values() for name in group])
def test_every_parallel_configuration_finds_the_same(runs, name):
    for row, expected in zip(tiny_run.rows(runs / name), tiny_run.rows(runs / "one"), strict=True):
        assert len(row["validation"]) == 2
        for found, wanted in zip(row["validation"], expected["validation"], strict=True):
            assert found["samples"] == wanted["samples"] and found["bad"] == 0
            for kind in ("loss", "image_loss", "text_loss"):
                assert found[kind] == (wanted[kind] and pytest.approx(wanted[kind], rel=1e-5))


def test_it_is_the_mean_loss_per_target_of_the_model_after_the_step(runs):
    """Against logits of the last checkpoint, sample by sample."""
    loaded = load_model(runs / "one")
    config = load_config(runs / "one" / "run.yaml")
    source = ValidationDataset(
        ShardedDataset(runs / "held out"),
        SAMPLES,
        SampleBuilder.of(config, loaded.tokenizer),
        row_alignment=1,
    )
    losses, targets = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for number in range(len(source)):
        batch = source[[number]]
        with torch.no_grad():
            logits = loaded.model(
                batch.tokens,
                batch.image,
                batch.vision_token_index,
                batch.modality,
                batch.position_ids,
            )
        loss = torch.nn.functional.cross_entropy(
            logits[0].double(), batch.labels[0], reduction="sum"
        )
        image = len(batch.vision_token_index) > 0
        losses[image] += float(loss)
        targets[image] += int(batch.loss_mask.sum())
    setup.shutdown()
    found, texts = tiny_run.rows(runs / "one")[-1]["validation"]
    assert found["name"] == "held out" and found["samples"] == SAMPLES
    assert found["loss"] == pytest.approx(sum(losses.values()) / sum(targets.values()), rel=1e-5)
    assert found["image_loss"] == pytest.approx(losses[True] / targets[True], rel=1e-5)
    assert found["text_loss"] == pytest.approx(losses[False] / targets[False], rel=1e-5)
    assert texts["image_loss"] is None and texts["loss"] == texts["text_loss"]


def test_training_is_the_same_with_and_without(runs):
    assert tiny_run.figures(runs / "one") == tiny_run.figures(runs / "none")
    assert "validation" not in tiny_run.rows(runs / "none")[0]
    assert (
        tiny_run.rows(runs / "one")[0]["validation"] != tiny_run.rows(runs / "one")[1]["validation"]
    )


def test_bad_samples_are_left_out_counted_and_named(tmp_path):
    config = tiny_run.make(tmp_path, 3)

    def damaged(index):
        record = tiny_data.record(index)
        if index != 1:
            return record
        return Record(record.key, (b"\xff\xd8\xff" + bytes(50),), record.caption, record.turns)

    assert tiny_data.record(1).images
    tiny_data.write(tmp_path / "damaged", map(damaged, range(8)))
    tiny_data.write(tmp_path / "rest", [damaged(index) for index in range(8) if index != 1])
    done = tiny_run.train(
        config,
        tmp_path / "run",
        f"validation.sources=['{tmp_path / 'damaged'}','{tmp_path / 'rest'}']",
        "validation.interval=2",
        "validation.samples=0",
        "parallel.tensor=2",
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    first, second, last = tiny_run.rows(tmp_path / "run")
    assert "validation" not in first, "only every second step, and the last"
    for row in (second, last):
        bad, rest = row["validation"]
        assert (bad["samples"], bad["bad"]) == (7, 1) and (rest["samples"], rest["bad"]) == (7, 0)
        assert bad["loss"] == pytest.approx(rest["loss"], rel=1e-6)
        line = next(x for x in done.stdout.splitlines() if f" {row['step']}/3 " in x)
        assert f"validation damaged {bad['loss']:.4f}" in line
    assert f"validation leaves out {tmp_path / 'damaged'}/" in done.stderr
    assert "image cannot be decoded" in done.stderr


def test_ranks_of_one_model_that_read_other_samples_stop_the_run(tmp_path):
    config = tiny_run.make(tmp_path, 3)
    done = tiny_run.train(
        config,
        tmp_path / "run",
        f"validation.sources=['{tmp_path / 'shards'}']",
        "validation.interval=1",
        "validation.samples=0",
        "parallel.tensor=2",
        processes=2,
        fault=faults.validation_images_of_rank_1_are_damaged,
    )
    assert done.returncode != 0
    assert "error: rank 0: the ranks of one model found 0 to " in done.stderr
    assert str(tmp_path / "shards") in done.stderr and not tiny_run.rows(tmp_path / "run")


def test_samples_are_spread_over_the_source(tmp_path):
    config = tiny_run.make(tmp_path)
    dataset = ShardedDataset(tmp_path / "shards")
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")

    def keys(samples: int) -> list[str]:
        source = ValidationDataset(
            dataset,
            samples,
            SampleBuilder.of(load_config(config), tokenizer, decode_images=False),
            row_alignment=1,
        )
        return [source[[number]].keys[0] for number in range(len(source))]

    assert len(dataset) == 60
    assert keys(4) == [dataset[index].key for index in (0, 15, 30, 45)]
    assert keys(0) == keys(1000) == [dataset[index].key for index in range(60)]
    assert json.loads(json.dumps(load_config(config).validation.sources)) == []
