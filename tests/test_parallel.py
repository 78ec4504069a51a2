"""The same optimizer steps from the same checkpoint under every parallel layout, over gloo.

Each run takes three steps of 8 samples, text-only ones among them. With beta1 = 0 the first moment
that a checkpoint holds is the gradient of the last step, so whole gradients are compared after
the real training loop, whatever layout made them.
"""

import pytest
import stored
import tiny_run

from megatron_owl2 import config as configuration
from megatron_owl2.data import phases
from megatron_owl2.data.dataset import open_datasets
from megatron_owl2.data.loader import build_loader
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.training import checkpoint

STEPS = 3
TP, PP, CP, SP = (
    "parallel.tensor=2",
    "parallel.pipeline=2",
    "parallel.context=2",
    "parallel.sequence=true",
)
VP, ONE = "parallel.virtual_pipeline=2", "train.micro_batch_size=1"
FULL, SELECTIVE = "parallel.recompute=full", "parallel.recompute=selective"
LAYOUTS = {
    "one process": (1, []),
    "TP 2": (2, [TP]),
    "TP 2 SP": (2, [TP, SP]),
    "PP 2": (2, [PP]),
    "PP 2 of 1 and 3 layers": (2, [PP, "parallel.layers=[1,3]"]),
    "VP 2": (2, [PP, VP]),
    "DP 2": (2, [ONE]),
    "DP 2 without overlap": (2, [ONE, "parallel.overlap=false"]),
    "CP 2": (2, [CP]),
    "DP 4": (4, [ONE]),
    "TP 2 PP 2": (4, [TP, PP]),
    "TP 2 SP PP 2": (4, [TP, SP, PP]),
    "TP 2 SP DP 2": (4, [TP, SP, ONE]),
    "TP 2 SP CP 2": (4, [TP, SP, CP]),
    "PP 2 DP 2": (4, [PP, ONE]),
    "PP 2 CP 2": (4, [PP, CP]),
    "CP 2 DP 2": (4, [CP, ONE]),
    "VP 2 with a stage of no layers, DP 2": (4, [PP, VP, ONE, "parallel.layers=[0,2,1,1]"]),
}
STAGES = {
    "everything": [],
    "stage 1": [
        "stage.trainable=['vision_model.*','abstractor.*','*.linear_kv_vision.weight','*vision']"
    ],
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A configuration whose runs start from one checkpoint, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("parallel")
    config = tiny_run.make(folder, STEPS)
    made = tiny_run.train(config, folder / "initial", "train.steps=1")
    assert made.returncode == 0, made.stderr
    options = [
        f"stage.initial_checkpoint={folder / 'initial'}",
        "optimizer.beta1=0",
        "optimizer.lr=1e-3",
        "optimizer.clip_grad=0",
    ]
    found = {}
    for name, stage in STAGES.items():
        done = tiny_run.train(config, folder / name, *options, *stage)
        assert done.returncode == 0, done.stderr
        found[name] = tiny_run.figures(folder / name), gradients(folder / name)
        assert [step for step, *_ in found[name][0]] == [1, 2, 3]
    return config, options, found


def gradients(run):
    """The gradient of every trained parameter at the last step."""
    return stored.read(checkpoint.resolve(run), stored.MOMENT)


def check(start, stage, name, tmp_path, *overrides):
    """Loss, gradient norm and every gradient within 1e-5 of one process's."""
    config, options, found = start
    processes, layout = LAYOUTS[name]
    run = tmp_path / "run"
    done = tiny_run.train(
        config, run, *options, *STAGES[stage], *layout, *overrides, processes=processes
    )
    assert done.returncode == 0, done.stderr
    figures, expected = found[stage]
    for ours, reference in zip(tiny_run.figures(run), figures, strict=True):
        assert ours == pytest.approx(reference, rel=1e-5)
    ours = gradients(run)
    assert ours.keys() == expected.keys()
    errors = {name: error(ours[name], expected[name]) for name in expected if not silent(name)}
    worst = max(errors, key=errors.get)
    print(f"{stage}, {name}, {overrides}: {errors[worst]:.1e} in {worst}")
    assert errors[worst] <= 1e-5, worst
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name in filter(silent, expected):
        assert ours[name].norm() < 1e-6 * scale


def error(ours, expected) -> float:
    return float((ours - expected).norm() / expected.norm())


def silent(name: str) -> bool:
    """Whether a parameter has no gradient but for rounding: one number for all keys of a query
    changes no attention."""
    return name.startswith("abstractor.") and name.endswith(".key.bias")


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one process"])
def test_losses_and_all_gradients_do_not_depend_on_the_layout(start, tmp_path, name):
    check(start, "everything", name, tmp_path)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("one process", FULL),
        ("one process", SELECTIVE),
        ("TP 2 SP", SELECTIVE),
        ("TP 2 SP CP 2", FULL),
        ("TP 2 PP 2", FULL),
        ("VP 2", FULL),
        ("DP 2", FULL),
        ("PP 2 CP 2", SELECTIVE),
    ],
)
def test_nor_on_recomputation_with_micro_batches_in_flight(start, tmp_path, name, kind):
    check(start, "everything", name, tmp_path, kind)


@pytest.mark.parametrize("name", ["TP 2 SP", "PP 2", "VP 2", "DP 2", "CP 2 DP 2"])
def test_a_frozen_language_model_trains_alike_under_every_layout(start, tmp_path, name):
    check(start, "stage 1", name, tmp_path, FULL)


def test_micro_batches_without_pictures_are_first_and_last_and_between(start):
    """What DP 2 with overlapped reduction reads above, so that its proof covers them."""
    config = configuration.load(start[0])
    datasets = open_datasets(config.data)
    patterns = []
    for rank in range(2):
        batches = build_loader(
            config.data,
            datasets,
            phases.first_phase(config.data, datasets),
            tokenizer=Tokenizer(config.data.tokenizer),
            tokens_per_image=config.model.tokens_per_image,
            image_size=config.model.vision.image_size,
            micro_batch_size=1,
            start_slot=0,
            data_parallel_rank=rank,
            data_parallel_size=2,
            limit_slots=8 * STEPS,
        )
        kinds = "".join("i" if batch.modality.any() else "t" for batch in batches)
        patterns += [kinds[first : first + 4] for first in range(0, 4 * STEPS, 4)]
    assert any(p[0] == "t" for p in patterns) and any(p[-1] == "t" for p in patterns)
    assert any("t" in p[1:-1] for p in patterns)


def test_bf16_is_close_to_fp32(start, tmp_path):
    config, options, found = start
    done = tiny_run.train(config, tmp_path / "run", *options, "train.precision=bf16", processes=2)
    assert done.returncode == 0, done.stderr
    for ours, reference in zip(
        tiny_run.figures(tmp_path / "run"), found["everything"][0], strict=True
    ):
        assert ours[1] == pytest.approx(reference[1], rel=0.02)
        assert ours[1] != reference[1]


def test_the_second_step_shows_that_the_first_one_learned(start):
    everything, stage_1 = (start[2][name][0] for name in STAGES)
    assert everything[1][1] < everything[0][1]
    assert everything != stage_1
