"""Both stages of mPLUG-Owl (version 1), small: the same under every parallelism and after a resume,
dropout in the abstractor and in the adapters included."""

import pytest
import runs_in_turn
import stored
import tiny_data
import tiny_run

from megatron_owl2.config.load import load_config
from megatron_owl2.config.lora import is_adapter
from megatron_owl2.config.templates import TEMPLATES
from megatron_owl2.data.tokenizer import train_tokenizer
from megatron_owl2.errors import CheckpointError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import build
from megatron_owl2.training.checkpoint import directories, save_load

pytestmark = pytest.mark.distributed

STEPS = 3
MODEL = [
    "model.template=owl1",
    "model.abstractor.positions=none",
    "model.abstractor.attention_dropout=0.25",
    "model.decoder.modality_split=[]",
    "model.decoder.max_positions=160",
    "data.sequence_length=160",
]
STEADY = ["optimizer.beta1=0", "optimizer.lr=1e-3", "optimizer.min_lr=1e-3"]
STEADY += ["optimizer.clip_grad=0"]
STAGE_1 = ["stage.trainable=[vision_model.*, abstractor.*]", *STEADY]
STAGE_2 = [
    "stage.trainable=[]",
    "stage.lora.targets=['*.attention.query', '*.attention.value_text']",
    "stage.lora.alpha=32",
    "stage.lora.dropout=0.05",
    "data.augment=true",
    *STEADY,
]
ONE = "train.micro_batch_size=1"
PARALLELISMS = {  # beside DP 2
    "TP 2": ["parallel.tensor=2"],
    "TP 2 SP": ["parallel.tensor=2", "parallel.sequence=true", "parallel.recompute=full"],
    "selective": ["parallel.tensor=2", "parallel.recompute=selective"],
    "PP 2": ["parallel.pipeline=2"],
    "CP 2": ["parallel.context=2"],
}
STAGES = ("pretrain", "finetune")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs; one launch of two ranks does them all."""
    folder = tmp_path_factory.mktemp("owl1")
    config = tiny_run.make(folder, STEPS)
    records = list(map(tiny_data.record, range(60)))
    for name, with_images in (("text", False), ("images", True)):
        chosen = [record for record in records if bool(record.images) == with_images]
        tiny_data.write(folder / name, chosen)
    words = [f"Human: say {i}\nAI: it is picture number {i} sure? yes" for i in range(60)]
    words += [TEMPLATES["owl1"].system] * 60
    train_tokenizer(words, folder / "owl1.model", 320)
    sources = [f"{{path: {folder / name}, group: {name}}}" for name in ("text", "images")]
    grouped = [f"data.sources=[{', '.join(sources)}]", "data.groups={images: 4, text: 4}"]
    common = [*MODEL, f"data.tokenizer={folder / 'owl1.model'}"]
    stages = {
        "pretrain": [*common, *STAGE_1, f"stage.initial_checkpoint={folder / 'base'}"],
        "finetune": [
            *common,
            *STAGE_2,
            *grouped,
            f"stage.initial_checkpoint={folder / 'pretrain whole'}",
        ],
    }
    plan = [("base", [*common, "train.steps=1"])]
    for stage, options in stages.items():
        plan += [
            (f"{stage} whole", [*options, ONE]),
            (f"{stage} resumed", [*options, ONE, "train.steps=2"]),
            (f"{stage} resumed", [*options, ONE]),
            *((f"{stage} {name}", [*options, *more]) for name, more in PARALLELISMS.items()),
        ]
    plan.append(("no dropout", [*stages["pretrain"], ONE, "model.abstractor.attention_dropout=0"]))
    done = runs_in_turn.launch(config, [(folder / name, what) for name, what in plan], processes=2)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("continuing from") == 2
    return folder


def gradients(run):
    """Of the last step, which with beta1 = 0 the first moment is."""
    return stored.read(directories.resolve(run), stored.MOMENT)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", PARALLELISMS)
def test_losses_and_gradients_do_not_depend_on_the_parallelism(runs, stage, name):
    run, whole = runs / f"{stage} {name}", runs / f"{stage} whole"
    for ours, expected in zip(tiny_run.rows(run), tiny_run.rows(whole), strict=True):
        for key in ("step", "loss", "grad_norm"):
            assert ours[key] == pytest.approx(expected[key], rel=1e-5), key
    ours, expected = gradients(run), gradients(whole)
    assert ours.keys() == expected.keys()
    for parameter, gradient in expected.items():
        if not parameter.endswith("key.bias"):  # zero in exact arithmetic
            error = float((ours[parameter] - gradient).norm() / gradient.norm())
            assert error <= 2e-5, parameter


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(runs, stage):
    assert tiny_run.figures(runs / f"{stage} resumed") == tiny_run.figures(runs / f"{stage} whole")
    ours, expected = (
        stored.read(directories.resolve(runs / f"{stage} {name}")) for name in ("resumed", "whole")
    )
    assert ours.keys() == expected.keys()
    assert all(ours[name].equal(tensor) for name, tensor in expected.items())


def test_what_is_frozen_stays_as_it_was(runs):
    before, after = (stored.read(directories.resolve(runs / f"{stage} whole")) for stage in STAGES)
    adapters = {name for name in after if is_adapter(name) and not name.startswith("optimizer.")}
    assert len(adapters) == 2 * 2 * 4  # A and B of query and value, in four layers
    plain = {name for name in before if not name.startswith("optimizer.")}
    assert all(before[name].equal(after[name]) for name in plain)
    assert all(after[name].abs().sum() > 0 for name in adapters)


def test_dropout_of_the_abstractor_is_at_work(runs):
    (with_it, *_), (without, *_) = (
        tiny_run.figures(runs / name) for name in ("pretrain whole", "no dropout")
    )
    assert with_it != without and with_it[1] == pytest.approx(without[1], rel=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["model.abstractor.positions=sincos"],
            "positions=none, as version 1 does, not sincos; take a checkpoint of the same kind",
        ),
        (["model.decoder.modality_split=[key_value]"], "missing: .*linear_kv_vision.weight"),
    ],
)
def test_a_start_from_the_other_version_is_refused(runs, options, message):
    """Position tables are made where an older checkpoint lacks them: their absence says little."""
    config = load_config(runs / "pretrain whole" / "run.yaml", options)
    try:
        groups = setup.initialize(config.parallel)
        chunks = build(ParallelContext(config, groups), config.model, initialize=False)
        with pytest.raises(CheckpointError, match=message):
            save_load.load_weights(runs / "pretrain whole", chunks)
    finally:
        setup.shutdown()
