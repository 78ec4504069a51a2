"""Steps by Transformer Engine's Python on the CPU, with torch in place of its compiled kernels.

tests/helpers/te_stand_in.py says what is real and what is replaced: Python of Transformer Engine
and of megatron-core around it is real; GEMMs, attention, AdamW's arithmetic and user buffers are
torch's. In bf16; no FP8 code, no CUDA kernel and no NCCL runs. The steps are those of training, in
processes of their own, which the stand-in patches (tests/helpers/te_steps.py).
"""

import importlib.util
import json

import pytest
import tiny_run
from paths import HELPERS
from processes import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine_torch") is None,
        reason="needs Transformer Engine (its Python; no GPU), which is not installed",
    ),
]

ROUNDING = 5e-3  # of a gradient in bf16, relative; fused gradients are summed in fp32
LAYERS, MICRO_BATCHES = 4, 4  # of tiny_run
LINEARS = {"linear_proj", "linear_qkv", "linear_kv_vision", "linear_fc1", "linear_fc2"}


def run(folder, processes):
    config = tiny_run.make(folder)
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    program = [HELPERS / "te_steps.py", config, folder / "checkpoints"]
    done = run_ranks(processes, *program, environment=no_gpu, timeout=600, fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), 1)


def test_steps_of_all_stages_are_those_of_the_local_kernels(alone):
    assert len(alone["steps"]) == 3 * 3 * 2, "stages, recomputation, gradients fused or not"
    trained = {result["stage"]: result["local"]["count"] for result in alone["steps"]}
    assert trained["decoder"] < trained["frozen"] < trained["all"]
    for result in alone["steps"]:
        assert result["local"]["loss"] < ROUNDING and result["local"]["worst"] < ROUNDING, result
        assert result["local"]["largest"] > 0.1, "there are gradients"
        assert result["fewest_rows"] == 1, "a micro-batch of text gives one row, not none"


def test_only_fused_gradients_differ_from_those_that_are_not(alone):
    fused = [result for result in alone["steps"] if result["fuses"]]
    assert len(fused) == 9
    for result in fused:
        names = result["unfused"]["differ"]
        assert names and all(name.split(".")[-2] in LINEARS for name in names), result
        assert result["unfused"]["loss"] == 0.0
        assert result["fused without recomputation"]["differ"] == []
    (all_of_them,) = {len(r["unfused"]["differ"]) for r in fused if r["stage"] == "all"}
    assert all_of_them == LAYERS * len(LINEARS)


def test_a_run_by_fused_adamw_goes_on_bit_for_bit(alone):
    assert [result["stage"] for result in alone["continued"]] == ["all", "frozen"]
    assert all(result["moved"] > 50 for result in alone["continued"]), "a step moves parameters"


@pytest.mark.distributed
def test_tensor_parallel_steps_are_those_of_the_local_kernels(tmp_path):
    found = run(tmp_path, 2)
    results, refused = found["steps"], found["refused"]
    assert "UB_SKIPMC=1" in refused and "parallel.tensor_overlap=false" in refused
    assert [(r["recompute"], r["overlap"]) for r in results] == [
        ("none", False), ("none", True), ("full", False), ("full", True),
    ]  # fmt: skip
    for result in results:
        assert result["local"]["loss"] < ROUNDING and result["local"]["worst"] < ROUNDING, result
        again = result["recompute"] == "full"
        layers = LAYERS * MICRO_BATCHES * result["overlap"]
        # Forward the input of fc1, backward the gradients to the outputs of proj and fc2.
        assert result["gather"] == (3 + again) * layers
        assert result["reduce-scatter"] == 2 * (1 + again) * layers
