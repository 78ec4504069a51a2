"""Stages that train adapters: the same under every parallelism, after a resume and from a start."""

import shutil

import pytest
import runs_in_turn
import stored
import tiny_run

from megatron_owl2.config.lora import is_adapter
from megatron_owl2.training.checkpoint import directories

pytestmark = pytest.mark.distributed

STEPS = 3
LORA = [
    "stage.lora.targets=['*']",
    "stage.lora.rank=4",
    "stage.lora.dropout=0.2",
    "stage.trainable=['abstractor.vit_eos']",
]
STEADY = ["optimizer.beta1=0", "optimizer.lr=1e-3", "optimizer.min_lr=1e-3"]
STEADY += ["optimizer.clip_grad=0", "train.save_interval=2"]
FULL = "parallel.recompute=full"
PARALLELISMS = {
    "TP 2": ["parallel.tensor=2"],
    "TP 2 SP": ["parallel.tensor=2", "parallel.sequence=true", FULL],
    "PP 2": ["parallel.pipeline=2"],
    "CP 2": ["parallel.context=2"],
    "DP 2": ["train.micro_batch_size=1"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs: two launches, of one process and of two ranks."""
    folder = tmp_path_factory.mktemp("lora")
    config = tiny_run.make(folder, STEPS)
    lora = [f"stage.initial_checkpoint={folder / 'base'}", *STEADY, *LORA]
    from_adapters = [*lora, f"stage.initial_checkpoint={folder / 'whole'}", "train.steps=1"]
    done = runs_in_turn.launch(
        config,
        [
            (folder / "base", ["train.steps=1"]),
            (folder / "whole", lora),
            (folder / "recompute", [*lora, FULL]),
            (folder / "resumed", [*lora, "train.steps=2"]),
            (folder / "resumed", lora),
            (
                folder / "from adapters",
                [*from_adapters, "optimizer.lr=1e-30", "optimizer.min_lr=0"],
            ),
        ],
        processes=1,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("continuing from") == 1
    shutil.copytree(folder / "whole", folder / "resharded")
    tiny_run.set_back(folder / "resharded", 2)
    planned = [(folder / name, [*lora, *options]) for name, options in PARALLELISMS.items()]
    planned += [(folder / "resharded", [*lora, *PARALLELISMS["TP 2 SP"]])]
    done = runs_in_turn.launch(config, planned, processes=2)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def weights(run):
    return {
        name: tensor
        for name, tensor in stored.read(directories.resolve(run)).items()
        if not name.startswith("optimizer.")
    }


def gradients(run):
    """Of the last step, which with beta1 = 0 the first moment is."""
    return stored.read(directories.resolve(run), stored.MOMENT)


@pytest.mark.parametrize("name", [*PARALLELISMS, "resharded", "recompute"])
def test_losses_and_gradients_do_not_depend_on_the_parallelism(runs, name):
    for ours, expected in zip(
        tiny_run.rows(runs / name), tiny_run.rows(runs / "whole"), strict=True
    ):
        for key in ("step", "loss", "grad_norm"):
            assert ours[key] == pytest.approx(expected[key], rel=1e-5), key
    ours, expected = gradients(runs / name), gradients(runs / "whole")
    assert ours.keys() == expected.keys() and sum(map(is_adapter, ours)) == len(ours) - 1 == 72
    for parameter, gradient in expected.items():
        error = float((ours[parameter] - gradient).norm() / gradient.norm())
        assert error <= 1e-5, parameter


def test_only_adapters_and_what_is_named_change(runs):
    before, after = weights(runs / "base"), weights(runs / "whole")
    assert set(filter(is_adapter, after)) == after.keys() - before.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {"abstractor.vit_eos"}
    assert all(tensor.abs().sum() > 0 for name, tensor in after.items() if is_adapter(name))


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(runs):
    assert tiny_run.figures(runs / "resumed") == tiny_run.figures(runs / "whole")
    ours, expected = (stored.read(directories.resolve(runs / n)) for n in ("resumed", "whole"))
    assert ours.keys() == expected.keys()
    assert all(ours[name].equal(tensor) for name, tensor in expected.items())


def test_a_stage_starts_from_adapters_of_the_same_kind(runs):
    ours, expected = weights(runs / "from adapters"), weights(runs / "whole")
    assert all(ours[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stage.lora.alpha=32"], "were trained with stage.lora.alpha=16, not 32"),
        (["stage.lora.rank=2"], "query.lora_A is (4, 32) in the checkpoint, (2, 32)"),
        (["stage.lora.targets=[]", "stage.trainable=['*']"], "its adapters need the stage.lora"),
    ],
)
def test_a_start_from_other_adapters_is_refused(runs, tmp_path, options, message):
    start = [*LORA, f"stage.initial_checkpoint={runs / 'whole'}", *options]
    refused = tiny_run.train(runs / "run.yaml", tmp_path / "run", *start)
    assert refused.returncode == 2
    assert message in refused.stderr
