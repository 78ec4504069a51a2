"""tools/plan.py from its command line to its tables, and the configurations that it proposes."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from paths import ROOT
from processes import run_ranks

from megatron_owl2.config.load import load_config
from megatron_owl2.config.validate import validate_settings
from megatron_owl2.errors import ConfigError
from megatron_owl2.model.flops import training_flops
from megatron_owl2.planner import memory, plan, report, row_images, search, timing, traffic
from megatron_owl2.planner.costs import RunCosts, full_load
from megatron_owl2.planner.machine import Machine
from megatron_owl2.planner.static_memory import static_memory

pytestmark = pytest.mark.slow

FINETUNE = ROOT / "examples" / "7b" / "finetune.yaml"
PRETRAIN = ROOT / "examples" / "7b" / "pretrain.yaml"
TINY = ROOT / "examples" / "tiny" / "pretrain.yaml"
TENSOR_2 = ["parallel.tensor=2", "parallel.sequence=true"]
PLAIN, FUSED = "kernels.elementwise=plain", "kernels.elementwise=fused"
SMALLER = ["train.micro_batch_size=16", "train.precision=bf16"]


def run_tool(*arguments) -> subprocess.CompletedProcess:
    return run_ranks(1, ROOT / "tools" / "plan.py", *arguments)


COUNTED_RUN = """
import runpy, sys
del sys.argv[0]
from megatron_owl2.mcore.setup import setup
setup()
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.planner import activations
passes, builds, run, build = 0, 0, activations._run, Owl2.__init__
def count_run(*args, **options):
    global passes
    passes += 1
    return run(*args, **options)
def count_build(*args, **options):
    global builds
    builds += 1
    build(*args, **options)
activations._run, Owl2.__init__ = count_run, count_build
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(f"{passes} passes, {builds} models", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def tiny_plan():
    config = load_config(TINY, SMALLER)
    return plan.plan_run(config, Machine(gpus=8, memory_gib=8, reserve_gib=1), count=4)


def test_the_tool_prints_a_plan_and_writes_it(tmp_path):
    file = tmp_path / "plan.json"
    run = run_tool("--config", TINY, "--gpus", 2, "--gpu-memory", 8, "--json", file)
    assert run.returncode == 0, run.stderr
    assert "this configuration fits" in run.stdout and "not yet verified on a GPU" in run.stdout
    found = json.loads(file.read_text())
    (rank,) = found["memory"]
    held = rank["held"]
    parts = held["parameters"] + held["gradients"] + held["optimizer"]
    assert rank["total"] == parts + max(rank["activations"], rank["update"])
    assert found["fits"] and found["time"]["total"] > 0 and found["layouts"]
    assert f"{found['trained']:,} of {found['parameters']:,} parameters train" in run.stdout


def test_the_command_of_the_readme_needs_few_passes_of_the_model():
    """Processor time follows from these counts: they are all that is expensive in a plan."""
    arguments = ["--config", "examples/7b/pretrain.yaml", "--gpus", "64", "--gpu-memory", "80"]
    command = [sys.executable, "-c", COUNTED_RUN, str(ROOT / "tools" / "plan.py"), *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert "the fastest of 1,218 valid configurations" in run.stdout
    passes, builds = map(int, re.search(r"(\d+) passes, (\d+) models", run.stderr).groups())
    # With one row and with two, for no more than 3 kinds of recomputation and 4 tensor sizes; as
    # many models again for elementwise traffic; the whole model once for its weights and once for
    # the check of its sharding.
    assert passes <= 24
    assert builds <= 2 * 12 + 2


def test_exit_codes_tell_what_does_not_fit_from_what_cannot_run():
    small = run_tool("--config", TINY, "--gpus", 2, "--gpu-memory", 4.001)
    assert small.returncode == 1 and "does NOT fit" in small.stdout
    assert "are missing" in small.stdout and "none of" in small.stdout
    wrong = run_tool("--config", TINY, "--gpus", 3, "--gpu-memory", 80, "parallel.tensor=2")
    assert wrong.returncode == 2 and "parallel.tensor" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("overrides", "tokens", "said"),
    [
        (["stage.trainable=[abstracter.*]"], None, "pattern 'abstracter.*' matches no parameter"),
        (["stage.frozen=['*']"], None, "nothing would train"),
        ([], 16, "rows of 16 tokens"),  # an image takes 17
        ([], 37, "rows of 37 tokens"),  # a sequence has 36
    ],
)
def test_what_no_run_could_be_is_not_planned(overrides, tokens, said):
    config = load_config(TINY, overrides)
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan.plan_run(config, Machine(gpus=2, memory_gib=8), tokens=tokens, count=1)


def test_proposals_are_valid_fit_and_are_in_order(tiny_plan):
    candidates = tiny_plan.candidates
    assert 1 < len(candidates) <= 4 <= tiny_plan.valid
    times = [candidate.time.total for candidate in candidates]
    assert times == sorted(times)
    for candidate in candidates:
        validate_settings(candidate.config, 8)
        assert candidate.memory.total <= tiny_plan.machine.usable
        changed = search.overrides(candidate.config, tiny_plan.config).split()
        again = load_config(TINY, [*SMALLER, *changed])
        assert again.parallel == candidate.config.parallel
        assert again.train == candidate.config.train


def test_no_candidate_that_fits_is_faster_than_the_first(tiny_plan):
    config, machine = tiny_plan.config, tiny_plan.machine
    costs = RunCosts(config, machine.gpus)
    times = [
        timing.step_time(candidate, machine, costs).total
        for candidate in search.candidates(config, machine)
        if candidate.parallel.recompute == "none" and candidate.parallel.tensor <= 2
    ]
    assert min(times) >= tiny_plan.candidates[0].time.total * (1 - 1e-9)


def test_recomputation_is_proposed_only_where_memory_asks_for_it(tiny_plan):
    found = tiny_plan.by_recompute
    assert list(found) == ["none", "selective", "full"]
    times = [candidate.time.total for candidate in found.values()]
    assert times == sorted(times) and times[0] < times[-1]
    assert found["none"].memory.total == max(rank.total for rank in tiny_plan.memory)
    assert all(c.config.parallel.recompute == "none" for c in tiny_plan.candidates)
    tree = tiny_plan.to_json()["by_recompute"]
    assert [kind["fits"] for kind in tree.values()] == [True] * 3


def test_a_config_that_does_not_fit_is_told_what_to_set():
    options = ["train.micro_batch_size=32", "train.precision=bf16", "parallel.tensor=1", PLAIN]
    whole = plan.plan_run(load_config(TINY, options), Machine(gpus=1, memory_gib=80), count=1)
    none, selective, full = (kind.memory.total for kind in whole.by_recompute.values())
    assert none > selective > full
    for gib, remedy in ((selective, "selective"), (full, "full")):
        small = replace(whole, machine=Machine(gpus=1, memory_gib=gib / 2**30, reserve_gib=0))
        assert not small.fits and small.remedy == f"parallel.recompute={remedy}"
        assert f"are missing; set {small.remedy}" in report.verdict(small)
    machine = Machine(gpus=1, memory_gib=(full - 1) / 2**30, reserve_gib=0)
    smaller = plan.plan_run(whole.config, machine, count=1)
    changed = load_config(TINY, [*options, *smaller.remedy.split()])
    assert changed.train.micro_batch_size < 32
    assert plan.plan_run(changed, machine, count=1).fits
    assert replace(small, candidates=[], machine=Machine(1, 1)).remedy is None


@pytest.mark.parametrize(("recipe", "gpus", "gib"), [("pretrain", 64, 40.7), ("finetune", 8, 75.6)])
def test_the_recipes_fit_80_gib_without_recomputation(recipe, gpus, gib):
    config = load_config(FINETUNE.parent / f"{recipe}.yaml", [PLAIN])
    costs = RunCosts(config, gpus)
    (need,) = (rank.total for rank in memory.per_pipeline_rank(config, costs))
    assert config.parallel.recompute == "none" and need / 2**30 == pytest.approx(gib, abs=0.1)
    assert need <= Machine(gpus=gpus, memory_gib=80).usable


def test_json_and_words_say_the_same(tiny_plan):
    tree = json.loads(json.dumps(tiny_plan.to_json()))
    assert len(tree["layouts"]) == len(tiny_plan.candidates)
    words = report.text(tiny_plan)
    assert f"the fastest of {tree['valid']:,} valid configurations" in words
    assert tiny_plan.sharding in words
    for candidate in tree["layouts"]:
        assert (candidate["overrides"] or "(as the config has it)") in words


def test_days_follow_from_flops_and_steps(tiny_plan):
    total = sum(tiny_plan.model_flops.values())
    rate = 8 * 989e12 * 0.4
    assert tiny_plan.days == pytest.approx(total * tiny_plan.config.train.steps / rate / 86400)


@pytest.mark.parametrize(
    ("overrides", "seconds", "mfu"),
    [
        ([PLAIN, "parallel.recompute=full"], 3.4, 0.29),
        ([PLAIN], 2.45, 0.39),
        ([FUSED], 2.1, 0.46),
        ([PLAIN, *TENSOR_2], 3.0, 0.32),
    ],
)
def test_times_of_stage_1_on_64_gpus_are_those_of_an_estimate_by_hand(overrides, seconds, mfu):
    """GEMMs at 650 TFLOP/s, bytes by hand at 2.8 TB/s: made apart from this code, to 15-20 %."""
    config = load_config(PRETRAIN, overrides)
    machine = Machine(gpus=64, memory_gib=80)
    costs = RunCosts(config, machine.gpus)
    time = timing.step_time(config, machine, costs)
    load = full_load(config, config.train.global_batch_size)
    flops = sum(training_flops(config.model, load, costs.trained).values())
    assert time.total == pytest.approx(seconds, rel=0.18)
    assert flops / time.total / 64 / 989e12 == pytest.approx(mfu, rel=0.22)


def test_short_rows_take_less_time_and_padding_is_told_apart():
    config = load_config(TINY, SMALLER)
    machine = Machine(gpus=2, memory_gib=8)
    full = timing.step_time(config, machine, RunCosts(config, 2))
    costs = RunCosts(config, 2, tokens=18, mean_length=24)
    short = timing.step_time(config, machine, costs)
    assert full.padding == 0 < short.padding < (short.gemm + short.elementwise) / 4
    assert short.gemm < full.gemm and short.elementwise < full.elementwise
    assert costs.activations(config, 0).kept == RunCosts(config, 2).activations(config, 0).kept
    with pytest.raises(ConfigError, match="rows of 37 positions"):
        plan.plan_run(config, machine, mean_length=37)


def test_packed_rows_need_memory_for_their_most_images_and_time_for_the_mean(monkeypatch):
    monkeypatch.setattr(row_images, "POSITIONS_PER_IMAGE", 30)  # 4 images a row
    options = [*SMALLER, "data.sequence_length=128"]
    whole = load_config(TINY, options)
    packed, fewer = (
        load_config(TINY, [*options, "data.packing=true", f"data.images_per_row={n}"])
        for n in (6, 4)
    )
    machine = Machine(gpus=2, memory_gib=8)
    plain, six, four = (RunCosts(config, 2) for config in (whole, packed, fewer))
    image = four.activations(fewer, 0).kept - plain.activations(whole, 0).kept  # of 3 images more
    assert image > 0
    more = six.activations(packed, 0).kept - four.activations(fewer, 0).kept
    assert more == pytest.approx(image * 2 / 3, rel=0.02)
    slow, same = (timing.step_time(c, machine, of) for c, of in ((packed, six), (fewer, four)))
    assert slow == same and slow.gemm > timing.step_time(whole, machine, plain).gemm
    load = full_load(packed, 10)
    assert (load.images, load.vision_tokens, load.tokens) == (40, 40 * 17, 1280)
    assert load.targets == 1280 - 40 * 17
    crowded = load_config(TINY, [*options, "data.packing=true", "data.images_per_row=99"])
    assert row_images.most_images(crowded) == 128 // 17
    assert row_images.most_images(whole) == row_images.mean_images(whole) == 1


def test_steps_of_epochs_follow_from_the_data():
    config = load_config(TINY, [*SMALLER, "train.epochs=2", "data.packing=true"])
    found = plan.plan_run(config, Machine(gpus=2, memory_gib=8), count=1)
    assert found.days is None and found.to_json()["days"] is None
    words = report.text(found)
    assert "rows a step, steps follow from the data" in words
    assert "1 image and 36 tokens a packed row" in words and "days" not in words


def test_causes_add_up_and_the_largest_is_named(tiny_plan):
    time = tiny_plan.time
    tree = tiny_plan.to_json()["time"]
    causes = ("gemm", "elementwise", "recompute", "accumulate")
    assert tree["compute"] == pytest.approx(sum(tree[name] for name in causes))
    others = ("layers", "bubble", "data", "update")
    assert tree["total"] == pytest.approx(tree["compute"] + sum(tree[name] for name in others))
    slow = replace(time, recompute=10 * time.total)
    words = report.text(replace(tiny_plan, time=slow))
    assert "what dominates beside the GEMMs: recomputation of both" in words
    assert "not measured on a GPU" in words


def test_traffic_of_gradients_parameters_and_stages():
    pipeline = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]
    config = load_config(FINETUNE, [*TENSOR_2, *pipeline])
    costs = RunCosts(config, 64)
    sent = traffic.per_pipeline_rank(config, costs)
    held = static_memory(config, 64, costs.weights)
    for ours, kept in zip(sent, held, strict=True):
        assert ours.gradients == kept.gradients * 15 // 16  # 16 data-parallel ranks
        assert ours.parameters == kept.buffer * 2 * 15 // 16
    # 4 micro-batches; 4 stages have 3 borders, crossed forward and backward, on 2 ranks.
    states = 2048 // 2 * 4096 * 2
    assert [rank.pipeline for rank in sent] == [3 * states * 4, 3 * states * 4]
    assert sent[0].tensor > sent[1].tensor > 0  # the ViT is on the first


def test_time_knows_bubble_overlap_and_recomputation():
    machine = Machine(gpus=64, memory_gib=80)
    # With an image a row; with several the first pipeline rank is busy all the time.
    config = load_config(FINETUNE, [*TENSOR_2, "data.packing=false"])
    costs = RunCosts(config, machine.gpus)

    def time(**parallel):
        changed = replace(config, parallel=replace(config.parallel, **parallel))
        return timing.step_time(changed, machine, costs)

    plain, again = time(), time(recompute="full")
    assert plain.bubble == plain.recompute == 0
    # A third of the GEMMs, and a forward pass of what is elementwise.
    assert 1 / 3 < again.recompute / plain.gemm < 0.42
    assert (again.gemm, again.elementwise) == (plain.gemm, plain.elementwise)
    overlapped = time(tensor_overlap=True)
    assert overlapped.layers / plain.layers == pytest.approx(1 - machine.overlap_efficiency)
    alone, with_buffers = (
        memory.per_pipeline_rank(replace(config, parallel=parallel), costs)[0].activations
        for parallel in (config.parallel, replace(config.parallel, tensor_overlap=True))
    )
    assert with_buffers - alone == 12 * 2048 * 4096 * 2  # user buffers
    assert time(overlap=False).data > plain.data
    pipelined, interleaved = time(pipeline=4), time(pipeline=4, virtual_pipeline=4)
    assert 0 < interleaved.bubble < pipelined.bubble
    # Rings that leave a node share the network cards of the GPUs that they have there.
    assert machine.sending(1e9, 8) == pytest.approx(1 / 300)
    assert machine.sending(1e9, 16) == pytest.approx(1 / 300)  # of 8 cards
    assert machine.sending(1e9, 16, 2) == pytest.approx(1 / 160)
    assert machine.sending(1e9, 16, 8) == machine.sending(1e9, 16, 16) == pytest.approx(1 / 40)


def test_transformer_engine_is_planned_on_a_laptop_and_says_so():
    config = load_config(TINY, [*SMALLER, "kernels.backend=transformer_engine"])
    found = plan.plan_run(config, Machine(gpus=2, memory_gib=80), count=1)
    assert "kernels.backend=transformer_engine keeps other tensors" in report.text(found)


def test_what_fits_in_bf16_need_not_fit_with_copies_in_fp8():
    sizes = ["model.decoder.ffn_size=384", "data.sequence_length=64"]  # that FP8 GEMMs take
    options = [*SMALLER, *sizes, "kernels.backend=transformer_engine"]
    plain = load_config(TINY, options)
    fp8 = load_config(TINY, [*options, "kernels.fp8=tensorwise"])
    (need,) = (rank.total for rank in plan.plan_run(plain, Machine(gpus=2, memory_gib=80)).memory)
    machine = Machine(gpus=2, memory_gib=(need + 1000) / 2**30, reserve_gib=0)
    without, found = (plan.plan_run(config, machine, count=1) for config in (plain, fp8))
    assert without.fits and "FP8 copies" not in report.text(without)
    assert not found.fits and "FP8 copies" in report.text(found)
    assert found.memory[0].total - need == found.memory[0].held.copies > 1000
