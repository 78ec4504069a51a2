"""The same optimizer steps from the same checkpoint under every parallelism, over gloo.

Each run takes two or three steps of 8 samples, text-only ones among them. With beta1 = 0 the first
moment that a checkpoint holds is the gradient of the last step, so whole gradients are compared
after the real training loop, whatever ranks made them. Runs on equally many processes share a
launch.
"""

import collections
import math

import dialogues
import pytest
import runs_in_turn
import stored
import tiny_run

from megatron_owl2.config.load import load_config
from megatron_owl2.model.flops import Load, training_flops
from megatron_owl2.training.checkpoint import directories

pytestmark = pytest.mark.distributed

STEPS, RESTRICTED_STEPS, LENGTH = 3, 2, 64
TP, PP, CP, SP = (
    "parallel.tensor=2",
    "parallel.pipeline=2",
    "parallel.context=2",
    "parallel.sequence=true",
)
VP, ONE = "parallel.virtual_pipeline=2", "train.micro_batch_size=1"
FULL, SELECTIVE = "parallel.recompute=full", "parallel.recompute=selective"
PARALLELISMS = {
    "one process": (1, []),
    "TP 2": (2, [TP]),
    "TP 2 SP": (2, [TP, SP]),
    "PP 2": (2, [PP]),
    "PP 2 of 1 and 3 layers": (2, [PP, "parallel.layers=[1,3]"]),
    "PP 2 with a first stage of no layers": (2, [PP, "parallel.layers=[0,4]"]),
    "VP 2": (2, [PP, VP]),
    "DP 2": (2, [ONE]),
    "DP 2 without overlap": (2, [ONE, "parallel.overlap=false"]),
    "CP 2": (2, [CP]),
    "DP 4": (4, [ONE]),
    "TP 2 PP 2": (4, [TP, PP]),
    "TP 2 SP PP 2": (4, [TP, SP, PP]),
    "TP 2 SP DP 2": (4, [TP, SP, ONE]),
    "TP 2 SP CP 2": (4, [TP, SP, CP]),
    "PP 4 with a stage of no layers": (4, ["parallel.pipeline=4", "parallel.layers=[1,0,2,1]"]),
    "PP 2 DP 2": (4, [PP, ONE]),
    "PP 2 CP 2": (4, [PP, CP]),
    "CP 2 DP 2": (4, [CP, ONE]),
    "TP 2 SP VP 2": (4, [TP, SP, PP, VP]),
    "VP 2 CP 2": (4, [PP, VP, CP]),
    "VP 2 with a stage of no layers, DP 2": (4, [PP, VP, ONE, "parallel.layers=[0,2,1,1]"]),
}
STAGES = {
    "everything": [],
    # Several samples in a row, with no image, one or two, in any turn.
    "packed": [
        "data.packing=true",
        "data.sources=[{path: FOLDER/dialogues}]",
        "data.images_per_row=4",
    ],
    "stage 1": [
        "stage.trainable=['vision_model.*','abstractor.*','*.linear_kv_vision.weight','*vision']"
    ],
    "vision only": ["stage.trainable=['vision_model.*','abstractor.*']"],
    "output layer only": ["stage.trainable=['output_layer.*']"],
}
CASES = [("everything", name, "") for name in PARALLELISMS if name != "one process"]
# With recomputation, several micro-batches are in flight under PP and VP.
CASES += [
    ("everything", "one process", FULL),
    ("everything", "one process", SELECTIVE),
    ("everything", "TP 2 SP", SELECTIVE),
    ("everything", "TP 2 SP CP 2", FULL),
    ("everything", "TP 2 PP 2", FULL),
    ("everything", "VP 2", FULL),
    ("everything", "DP 2", FULL),
    ("everything", "PP 2 CP 2", SELECTIVE),
]
CASES += [("stage 1", name, FULL) for name in ("TP 2 SP", "PP 2", "VP 2", "DP 2", "CP 2 DP 2")]
# Nothing trains on the last rank, nothing on the first.
CASES += [("vision only", "PP 2", ""), ("vision only", "VP 2", FULL)]
CASES += [("output layer only", "PP 2", ""), ("output layer only", "TP 2 PP 2", FULL)]
CASES += [("packed", name, "") for name in ("TP 2 SP", "PP 2", "CP 2", "DP 2", "DP 4")]
CASES += [("packed", name, "") for name in ("TP 2 SP PP 2", "TP 2 SP CP 2")]
CASES += [("packed", "VP 2", FULL), ("packed", "CP 2 DP 2", SELECTIVE)]
RESUMED = [("vision only", "PP 2"), ("output layer only", "PP 2")]


def steps(stage: str) -> int:
    return STEPS if stage == "everything" else RESTRICTED_STEPS


class Runs:
    """Where every run is; a launch does all that need as many processes, when one is asked for."""

    def __init__(self, folder):
        self.folder, self.config = folder, tiny_run.make(folder, STEPS)
        dialogues.write(folder / "dialogues", 90, folder / "tokenizer.model")
        self._launched = {}

    def _options(self, stage):
        return [
            f"train.steps={steps(stage)}",
            f"stage.initial_checkpoint={self.folder / 'initial'}",
            "optimizer.beta1=0",
            "optimizer.lr=1e-3",
            "optimizer.min_lr=1e-3",
            "optimizer.clip_grad=0",
            f"data.sequence_length={LENGTH}",
            *(option.replace("FOLDER", str(self.folder)) for option in STAGES[stage]),
        ]

    def of(self, stage, parallelism, recompute=""):
        """The folder of a finished run."""
        self._launch(1)
        self._launch(PARALLELISMS[parallelism][0])
        return self._folder(stage, parallelism, recompute)

    def _folder(self, *case):
        return self.folder / "-".join(part.replace(" ", "_") for part in case)

    def _launch(self, processes):
        if processes not in self._launched:
            runs = list(self._planned(processes))
            self._launched[processes] = runs_in_turn.launch(self.config, runs, processes)
        done = self._launched[processes]
        assert done.returncode == 0, done.stderr[-5000:]

    def _planned(self, processes):
        if processes == 1:
            yield self.folder / "initial", ["train.steps=1"]
            for stage in STAGES:
                yield self._folder(stage, "one process", ""), self._options(stage)
        for stage, name, recompute in CASES:
            needed, parallelism = PARALLELISMS[name]
            if needed == processes:
                options = [*self._options(stage), *parallelism, *filter(None, [recompute])]
                yield self._folder(stage, name, recompute), options
        for stage, name in RESUMED:
            needed, parallelism = PARALLELISMS[name]
            if needed == processes:
                options = [*self._options(stage), *parallelism]
                yield self._folder(stage, name, "resumed"), [*options, "train.steps=1"]
                yield self._folder(stage, name, "resumed"), options
        if processes == 2:
            options = [
                *self._options("everything"),
                *PARALLELISMS["DP 2"][1],
                "train.precision=bf16",
            ]
            yield self._folder("everything", "DP 2", "bf16"), options


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("parallel"))


def gradients(run):
    """The gradient of every trained parameter at the last step."""
    return stored.read(directories.resolve(run), stored.MOMENT)


def error(ours, expected) -> float:
    return float((ours - expected).norm() / expected.norm())


def work(row: dict, processes: int) -> list[float]:
    """Images, tokens and TFLOP of a sample on average."""
    rates = ("images_per_second", "tokens_per_second", "tflops_per_device")
    images, tokens, operations = (row[rate] / row["samples_per_second"] for rate in rates)
    return [images, tokens, operations * processes]


def silent(name: str) -> bool:
    """Whether a parameter has no gradient but for rounding: one number for all keys of a query
    changes no attention."""
    return name.startswith("abstractor.") and name.endswith(".key.bias")


@pytest.mark.parametrize(
    ("stage", "name", "recompute"), CASES, ids=lambda part: part.replace("parallel.", "")
)
def test_losses_and_all_gradients_do_not_depend_on_the_parallelism(runs, stage, name, recompute):
    run, reference = runs.of(stage, name, recompute), runs.of(stage, "one process")
    rows = tiny_run.rows(reference)
    assert [row["step"] for row in rows] == [*range(1, steps(stage) + 1)]
    apart = 0.0
    for ours, expected in zip(tiny_run.rows(run), rows, strict=True):
        for key in ("step", "loss", "grad_norm", "grad_norms"):
            assert ours[key] == pytest.approx(expected[key], rel=1e-5), key
        assert math.hypot(*ours["grad_norms"].values()) == pytest.approx(ours["grad_norm"], 1e-5)
        assert work(ours, PARALLELISMS[name][0]) == pytest.approx(work(expected, 1))
        apart = max(apart, abs(ours["loss"] / expected["loss"] - 1))
    ours, expected = gradients(run), gradients(reference)
    assert ours.keys() == expected.keys()
    errors = {name: error(ours[name], expected[name]) for name in expected if not silent(name)}
    worst = max(errors, key=errors.get)
    what = f"{stage} | {name} | {recompute.rpartition('=')[2] or 'none'}"
    print(f"| {what} | {apart:.1e} | {errors[worst]:.1e} | {worst} |")
    assert errors[worst] <= 1e-5, worst
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name in filter(silent, expected):
        assert ours[name].norm() < 1e-6 * scale


@pytest.mark.parametrize(("stage", "name"), RESUMED)
def test_a_run_goes_on_where_a_pipeline_rank_trains_nothing(runs, stage, name):
    run, whole = runs.of(stage, name, "resumed"), runs.of(stage, name)
    assert tiny_run.figures(run) == tiny_run.figures(whole)
    ours, expected = gradients(run), gradients(whole)
    assert all(ours[parameter].equal(gradient) for parameter, gradient in expected.items())


@pytest.mark.parametrize("stage", ["everything", "stage 1"])
def test_norms_by_part_are_those_of_the_whole_gradients(runs, stage):
    run, config = runs.of(stage, "one process"), load_config(runs.config).model.decoder
    norms = tiny_run.rows(run)[-1]["grad_norms"]
    parts = dict.fromkeys(norms, 0.0)
    for name, gradient in gradients(run).items():
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
    assert norms == pytest.approx(expected, rel=1e-5)
    trained = {part for part, norm in expected.items() if norm}
    assert trained == (set(expected) if stage == "everything" else set(expected) - {"text KV"})


def test_work_is_counted_by_what_the_samples_hold(runs):
    """Images, tokens and operations of the last step, from the batches it has read."""
    config = load_config(runs.config)
    load = collections.Counter()
    for batch in tiny_run.batches(config, 2, start_sample=8 * (STEPS - 1), limit_samples=8):
        for row, length in enumerate(batch.lengths.tolist()):
            has_image = bool(batch.modality[row].any())
            load["images"] += has_image
            load["vision_tokens"] += has_image * config.model.tokens_per_image
            load["tokens"] += length
            load["targets"] += int(batch.loss_mask[row].sum())
            load["pairs"] += sum(range(length + 1))
    run = runs.of("everything", "one process")
    operations = sum(training_flops(config.model, Load(**load), set(gradients(run))).values())
    row = tiny_run.rows(run)[-1]
    expected = [load["images"] / 8, load["tokens"] / 8, operations / 8 / 1e12]
    assert work(row, 1) == pytest.approx(expected)
    assert row["mfu"] is None, "a CPU has no peak"


def test_micro_batches_without_images_are_first_and_last_and_between(runs):
    """What DP 2 with overlapped reduction reads above, so that its proof covers them."""
    config = load_config(runs.config)
    patterns = []
    for rank in range(2):
        share = {"data_parallel_rank": rank, "data_parallel_size": 2}
        batches = tiny_run.batches(config, 1, limit_samples=8 * STEPS, **share)
        kinds = "".join("i" if batch.modality.any() else "t" for batch in batches)
        patterns += [kinds[first : first + 4] for first in range(0, 4 * STEPS, 4)]
    assert any(p[0] == "t" for p in patterns) and any(p[-1] == "t" for p in patterns)
    assert any("t" in p[1:-1] for p in patterns)


def test_micro_batches_of_a_step_differ_in_length(runs):
    """So that the proof covers it that pipeline stages agree on one length in a step, and that it
    is none of the configuration."""
    config = load_config(runs.config, [f"data.sequence_length={LENGTH}"])
    found = [batch.length for batch in tiny_run.batches(config, 2, limit_samples=8 * STEPS)]
    steps = [found[first : first + 4] for first in range(0, len(found), 4)]
    assert any(len(set(step)) > 1 for step in steps) and max(found) < LENGTH, steps


def test_bf16_is_close_to_fp32(runs):
    found = tiny_run.figures(runs.of("everything", "DP 2", "bf16"))
    for ours, reference in zip(
        found, tiny_run.figures(runs.of("everything", "one process")), strict=True
    ):
        assert ours[1] == pytest.approx(reference[1], rel=0.02)
        assert ours[1] != reference[1]


def test_the_second_step_shows_that_the_first_one_learned(runs):
    found = {stage: tiny_run.figures(runs.of(stage, "one process")) for stage in STAGES}
    assert found["everything"][1][1] < found["everything"][0][1]
    assert len({str(figures) for figures in found.values()}) == len(STAGES)
