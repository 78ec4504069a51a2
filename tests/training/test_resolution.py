"""A stage that starts from a checkpoint at another image size, as if it had been converted."""

import copy
import logging
import re
from pathlib import Path

import pytest
import runs_in_turn
import stored
import tiny_data
import tiny_run
import torch

from megatron_owl2.config.load import load_config
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.sources import from_checkpoint, from_released
from megatron_owl2.errors import CheckpointError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.layer_stack import weights
from megatron_owl2.model.owl2 import Owl2, build
from megatron_owl2.model.position_tables import IMAGE_POSITIONS
from megatron_owl2.model.vision import POSITION_EMBEDDING
from megatron_owl2.training.checkpoint import directories, save_load

pytestmark = pytest.mark.distributed

FINE = "model.vision.image_size=56"  # 4 x 4 patches; the checkpoint has 2 x 2
RESIZED = f"{POSITION_EMBEDDING} resized from 2 x 2 patches (28 px) to 4 x 4 patches (56 px)"


def make_model(config, initialize: bool = False) -> Owl2:
    context = ParallelContext(config, setup.initialize(config.parallel))
    (model,) = build(context, config.model, initialize=initialize)
    return model


def make_start(folder: Path, precision: str) -> RunConfig:
    """In `folder`, run.yaml of a run at 28 px, `initial`, a checkpoint of it, and `converted`, that
    one at 56 px; returns the configuration of a run at 56 px."""
    config = load_config(tiny_run.make(folder), [f"train.precision={precision}"])
    torch.manual_seed(5)
    save_load.save(folder / "initial", [make_model(config, initialize=True)], config)
    source = from_checkpoint(folder / "initial")
    export_hf(source.tensors, source.config.model, folder / "hf", tokenizer=config.data.tokenizer)
    fine = load_config(folder / "run.yaml", [FINE, f"train.precision={precision}"])
    converted = from_released(folder / "hf", config=copy.deepcopy(fine))
    write_checkpoint(folder / "converted", converted.tensors, converted.config)
    return fine


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def start(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return make_start(folder, request.param), folder


def test_it_holds_what_the_conversion_makes_of_it(start, caplog):
    config, folder = start
    direct, converted = make_model(config), make_model(config)
    with caplog.at_level(logging.INFO):
        save_load.load_weights(folder / "initial", [direct], any_resolution=True)
    assert [r.getMessage() for r in caplog.records if "resized" in r.getMessage()] == [RESIZED]
    save_load.load_weights(folder / "converted", [converted], any_resolution=True)
    assert caplog.text.count("resized") == 1  # nothing to resize
    found, wanted = weights(direct), weights(converted)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    before = stored.read(folder / "initial")
    table = found[POSITION_EMBEDDING][0]
    assert torch.equal(table[0], before[POSITION_EMBEDDING][0, 0])
    assert len(table) == 17 and len(found[IMAGE_POSITIONS]) == 17
    # Bicubic with a = -0.75: the corner is 0.375 patches outside the middle of the coarse one.
    a, b = 1.10546875, -0.10546875
    coarse = before[POSITION_EMBEDDING][0, 1:].float().view(2, 2, -1)
    corner = torch.einsum("r,c,rch->h", *[torch.tensor([a, b])] * 2, coarse)
    torch.testing.assert_close(table[1].float(), corner, atol=0.02, rtol=0.02)


def test_what_else_differs_is_refused_by_name(start):
    config, folder = start
    with pytest.raises(CheckpointError, match=f"shape: {POSITION_EMBEDDING} is"):
        save_load.load_weights(folder / "initial", [make_model(config)])  # as generation loads it

    def refused(override: str) -> list[str]:
        other = load_config(folder / "run.yaml", [FINE, override])
        with pytest.raises(CheckpointError) as refusal:
            save_load.load_weights(folder / "initial", [make_model(other)], any_resolution=True)
        return re.findall(r"(?:shape|missing|unexpected): (\S+)", str(refusal.value))

    names = refused("model.abstractor.num_queries=5")
    assert names == ["abstractor.query_embeds", "abstractor.query_positions"]
    assert POSITION_EMBEDDING in refused("model.vision.hidden_size=64")
    patch = "model.vision.patch_size=7"
    assert refused(patch) == ["vision_model.patch_embed.weight"]


def test_an_older_checkpoint_without_tables_is_taken(start, tmp_path):
    config, folder = start
    source = from_checkpoint(folder / "initial")
    kept = {name: t for name, t in source.tensors.items() if "_positions" not in name}
    write_checkpoint(tmp_path / "older", kept, source.config)
    older, newer = make_model(config), make_model(config)
    save_load.load_weights(tmp_path / "older", [older], any_resolution=True)
    save_load.load_weights(folder / "initial", [newer], any_resolution=True)
    assert all(torch.equal(weights(older)[n], tensor) for n, tensor in weights(newer).items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on two ranks, one of them in two goes."""
    folder = tmp_path_factory.mktemp("runs")
    make_start(folder, "fp32")
    tiny_data.write(folder / "held out", map(tiny_data.record, range(100, 108)))
    tensor = [FINE, "train.save_interval=1", "optimizer.lr=1e-3", "optimizer.min_lr=1e-3"]
    tensor += [f"validation.sources=['{folder / 'held out'}']", "validation.interval=1"]
    pipeline, tensor = [*tensor, "parallel.pipeline=2"], [*tensor, "parallel.tensor=2"]
    initial, converted = (
        [f"stage.initial_checkpoint={folder / name}"] for name in ("initial", "converted")
    )
    wanted = [
        (folder / name, [f"train.steps={steps}", *options])
        for name, steps, options in (
            ("direct", 1, tensor + initial),
            ("indirect", 1, tensor + converted),
            ("direct", 2, tensor + initial),  # goes on
            ("indirect", 2, tensor + converted),
            ("pipeline", 1, pipeline + initial),
            ("padded", 1, [*tensor, *initial, "model.image_mode=pad"]),
        )
    ]
    done = runs_in_turn.launch(folder / "run.yaml", wanted, 2)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_runs_of_many_ranks_are_those_from_the_converted_checkpoint(runs):
    folder, said = runs
    direct, indirect = (tiny_run.figures(folder / name) for name in ("direct", "indirect"))
    assert direct == indirect and [step for step, *_ in direct] == [1, 2]
    ends = [stored.read(directories.resolve(folder / name)) for name in ("direct", "indirect")]
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())
    ((_, loss, norm),) = tiny_run.figures(folder / "pipeline")
    assert (loss, norm) == pytest.approx(direct[0][1:], rel=1e-5)
    assert said.count(RESIZED) == 3  # direct, pipeline and padded: not when it goes on


def test_training_and_validation_follow_the_image_mode(runs):
    folder, _ = runs
    stretched, padded = (tiny_run.rows(folder / name)[0] for name in ("direct", "padded"))
    assert padded["loss"] != pytest.approx(stretched["loss"], rel=1e-6)
    (held_out,), (other,) = stretched["validation"], padded["validation"]
    assert other["image_loss"] != pytest.approx(held_out["image_loss"], rel=1e-6)
    assert load_config(folder / "padded" / "run.yaml").model.image_mode == "pad"
