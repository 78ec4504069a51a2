"""Stages that train adapters: the same under every parallelism, after a resume and from a start."""

import pytest
import runs_in_turn
import stored
import tiny_run

from megatron_owl2.config.load import load_config
from megatron_owl2.config.lora import is_adapter
from megatron_owl2.errors import CheckpointError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model import layer_stack
from megatron_owl2.model.owl2 import build
from megatron_owl2.training.checkpoint import directories, save_load

pytestmark = pytest.mark.distributed

STEPS = 3
LORA = [
    "stage.lora.targets=['*']",
    "stage.lora.rank=4",
    "stage.lora.dropout=0.2",
    "stage.trainable=['abstractor.vit_eos']",
]
STEADY = ["optimizer.beta1=0", "optimizer.lr=1e-3", "optimizer.min_lr=1e-3"]
STEADY += ["optimizer.clip_grad=0"]
DP = ["train.micro_batch_size=1"]
TP = ["parallel.tensor=2"]
PARALLELISMS = {  # beside DP 2
    "TP 2": TP,
    "TP 2 SP": [*TP, "parallel.sequence=true", "parallel.recompute=full"],
    "PP 2": ["parallel.pipeline=2"],
    "CP 2": ["parallel.context=2"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs; one launch of two ranks does them all."""
    folder = tmp_path_factory.mktemp("lora")
    config = tiny_run.make(folder, STEPS)
    lora = [f"stage.initial_checkpoint={folder / 'base'}", *STEADY, *LORA]
    plan = [
        ("base", ["train.steps=1"]),
        ("whole", [*lora, *DP]),
        ("resumed", [*lora, *DP, "train.steps=2"]),
        ("resumed", [*lora, *DP]),
        ("TP 2", [*lora, *DP, "train.steps=2"]),  # and goes on
        *((name, [*lora, *options]) for name, options in PARALLELISMS.items()),
    ]
    done = runs_in_turn.launch(config, [(folder / name, what) for name, what in plan], processes=2)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("continuing from") == 2
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


@pytest.mark.parametrize("name", PARALLELISMS)
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


@pytest.fixture
def load(runs):
    """A function that loads the adapters that were trained into a model of other options."""

    def load(*options):
        config = load_config(runs / "run.yaml", [*LORA, *options])
        groups = setup.initialize(config.parallel)
        chunks = build(ParallelContext(config, groups), config.model, initialize=False)
        save_load.load_weights(runs / "whole", chunks)
        return layer_stack.weights(chunks[0])

    yield load
    setup.shutdown()


def test_a_stage_starts_from_adapters_of_the_same_kind(runs, load):
    ours, expected = load("stage.lora.dropout=0"), weights(runs / "whole")
    assert ours.keys() == expected.keys()
    assert all(ours[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stage.lora.alpha=32"], "were trained with stage.lora.alpha=16, not 32"),
        (["stage.lora.rank=2"], r"query.lora_A is \(4, 32\) in the checkpoint, \(2, 32\)"),
        (["stage.lora.rank=2"], "its adapters need the stage.lora that they were made with"),
        (["stage.lora.targets=['*.mlp.*']"], "unexpected: decoder.layers.0.*query.lora_A"),
        (["stage.lora.targets=[]"], "its adapters need the stage.lora that they were made with"),
    ],
)
def test_a_start_from_other_adapters_is_refused(load, options, message):
    with pytest.raises(CheckpointError, match=message):
        load(*options)
