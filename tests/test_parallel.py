"""The same optimizer steps from the same checkpoint under every parallel layout, over gloo.

Each run takes three steps of 8 samples, text-only ones among them. With beta1 = 0 the first moment
that a checkpoint holds is the gradient of the last step, so whole gradients are compared after
the real training loop, whatever layout made them.
"""

import collections
import math

import pytest
import stored
import tiny_run

from megatron_owl2 import config as configuration
from megatron_owl2.data import phases
from megatron_owl2.data.dataset import open_datasets
from megatron_owl2.data.loader import build_loader
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.flops import Load, training_flops
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
        found[name] = tiny_run.rows(folder / name), gradients(folder / name)
        assert [row["step"] for row in found[name][0]] == [1, 2, 3]
    return config, options, found


def gradients(run):
    """The gradient of every trained parameter at the last step."""
    return stored.read(checkpoint.resolve(run), stored.MOMENT)


def check(start, stage, name, tmp_path, *overrides):
    """Loss, gradient norms and every gradient within 1e-5 of one process's, and the same work."""
    config, options, found = start
    processes, layout = LAYOUTS[name]
    run = tmp_path / "run"
    done = tiny_run.train(
        config, run, *options, *STAGES[stage], *layout, *overrides, processes=processes
    )
    assert done.returncode == 0, done.stderr
    rows, expected = found[stage]
    for ours, reference in zip(tiny_run.rows(run), rows, strict=True):
        for key in ("step", "loss", "grad_norm", "grad_norms"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), key
        assert math.hypot(*ours["grad_norms"].values()) == pytest.approx(ours["grad_norm"], 1e-5)
        assert work(ours, processes) == pytest.approx(work(reference, 1))
    ours = gradients(run)
    assert ours.keys() == expected.keys()
    errors = {name: error(ours[name], expected[name]) for name in expected if not silent(name)}
    worst = max(errors, key=errors.get)
    print(f"{stage}, {name}, {overrides}: {errors[worst]:.1e} in {worst}")
    assert errors[worst] <= 1e-5, worst
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name in filter(silent, expected):
        assert ours[name].norm() < 1e-6 * scale


def work(row: dict, processes: int) -> list[float]:
    """Images, tokens and TFLOP of a sample on average."""
    rates = ("images_per_second", "tokens_per_second", "tflops_per_device")
    images, tokens, operations = (row[rate] / row["samples_per_second"] for rate in rates)
    return [images, tokens, operations * processes]


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


@pytest.mark.parametrize("stage", STAGES)
def test_norms_by_part_are_those_of_the_whole_gradients(start, stage):
    config = configuration.load(start[0]).model.decoder
    rows, found = start[2][stage]
    parts = dict.fromkeys(rows[-1]["grad_norms"], 0.0)
    for name, gradient in found.items():
        if name.startswith(("vision_model.", "abstractor.")):
            part = "ViT" if name.startswith("vision_model.") else "abstractor"
        elif name.endswith("linear_kv_vision.weight"):
            part = "vision KV"
        elif name.endswith("linear_qkv.weight"):
            part = "text KV"
            head = config.hidden_size // config.num_heads
            queries = config.num_heads // config.num_kv_heads
            heads = gradient.double().view(config.num_kv_heads, queries + 2, head, -1)
            parts["rest"] += float(heads[:, :queries].square().sum())
            gradient = heads[:, queries:]
        else:
            part = "rest"
        parts[part] += float(gradient.double().square().sum())
    expected = {part: math.sqrt(square) for part, square in parts.items()}
    assert rows[-1]["grad_norms"] == pytest.approx(expected, rel=1e-5)
    trained = {part for part, norm in expected.items() if norm}
    assert trained == (set(expected) if stage == "everything" else set(expected) - {"text KV"})


def test_work_is_counted_by_what_the_samples_hold(start):
    """Images, tokens and operations of the last step, from the batches it has read."""
    config = configuration.load(start[0])
    datasets = open_datasets(config.data)
    load = collections.Counter()
    for batch in build_loader(
        config.data,
        datasets,
        phases.first_phase(config.data, datasets),
        tokenizer=Tokenizer(config.data.tokenizer),
        tokens_per_image=config.model.tokens_per_image,
        image_size=config.model.vision.image_size,
        micro_batch_size=2,
        start_slot=8 * (STEPS - 1),
        data_parallel_rank=0,
        data_parallel_size=1,
        limit_slots=8,
    ):
        for row, length in enumerate(batch.lengths.tolist()):
            pictured = bool(batch.modality[row].any())
            load["images"] += pictured
            load["vision_tokens"] += pictured * config.model.tokens_per_image
            load["tokens"] += length
            load["pairs"] += sum(range(length + 1))
    (rows, _), names = start[2]["everything"], set(start[2]["everything"][1])
    operations = sum(training_flops(config.model, Load(**load), names).values())
    expected = [load["images"] / 8, load["tokens"] / 8, operations / 8 / 1e12]
    assert work(rows[-1], 1) == pytest.approx(expected)
    assert rows[-1]["mfu"] is None, "a CPU has no peak"


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
        tiny_run.rows(tmp_path / "run"), found["everything"][0], strict=True
    ):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=0.02)
        assert ours["loss"] != reference["loss"]


def test_the_second_step_shows_that_the_first_one_learned(start):
    everything, stage_1 = ([row["loss"] for row in start[2][name][0]] for name in STAGES)
    assert everything[1] < everything[0]
    assert everything != stage_1
