"""Activations and traffic of the plan against what real passes allocate and send on the CPU."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_configs import STAGE_1, run_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from megatron_owl2.config.schema import (
    ParallelConfig,
    RunConfig,
)
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.planner import activations, live_memory
from megatron_owl2.planner import static_memory as weights
from megatron_owl2.planner.fake_process_groups import fake_process_groups
from megatron_owl2.training import parameter_groups

pytestmark = pytest.mark.slow


def planned(config: RunConfig, pipeline_stage: int = 0) -> activations.PipelineStageCost:
    return activations.ActivationCosts(weights.model_weights(config))(config, pipeline_stage)


def allocations(recorded: profile) -> list[int]:
    """Bytes that torch's CPU allocator gave (and, negative, got back), in their order."""
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def measured(config: RunConfig) -> tuple[int, int]:
    """Bytes that a real forward pass leaves, and the most in both passes."""
    context = ParallelContext(config, setup.initialize(config.parallel))
    model = Owl2(context, config.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = parameter_groups.is_trainable(name, config.stage)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    model(
        *activations.example_batch(config, 1)
    ).sum().backward()  # what kernels allocate at first use
    options = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
    with profile(**options) as forward:
        # Without a name the batch would be freed, which no training step does.
        batch = activations.example_batch(config, config.train.micro_batch_size)
        output = model(*batch)
    with profile(**options) as backward:
        torch.autograd.backward(output, torch.ones_like(output))
    setup.shutdown()
    now = most = kept = 0
    for number, recorded in enumerate((forward, backward)):
        for size in allocations(recorded):
            now += size
            most = max(most, now)
        kept = kept if number else now
    return kept, most


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recompute": "selective", "kv_heads": 2, "rows": 3},
        {"recompute": "full", "layers": 5},
        {"precision": "fp32", "hidden": 512, "rows": 1},
    ],
    ids=str,
)
def test_activations_are_what_the_allocator_gives(settings):
    config = run_config(**settings)
    kept, most = measured(config)
    cost = planned(config)
    assert cost.kept == pytest.approx(kept, rel=0.02)
    # The kernels' own scratch is not planned, and small models show it most.
    assert cost.kept + cost.working == pytest.approx(most, rel=0.1)


def test_frozen_weights_keep_no_inputs():
    # What the CPU's kernels need beside it for frozen bf16 weights has no counterpart on a GPU.
    config = run_config(trainable=STAGE_1)
    kept, _ = measured(config)
    cost = planned(config)
    assert cost.kept == pytest.approx(kept, rel=0.02)
    assert cost.kept < planned(run_config()).kept


def test_sequence_parallelism_splits_what_tensor_parallelism_holds_twice():
    config = run_config(tensor=2)
    whole, half = planned(config), planned(run_config(tensor=2, sequence=True))
    hidden_states = 2 * 128 * 256 * 2
    # Inputs of two norms and of the MLP's linear, and the sums between, are halved per layer.
    assert whole.kept - half.kept >= 3 * 3 * hidden_states // 2
    assert half.shared == hidden_states and whole.shared == 0


def test_stages_add_up_to_the_whole():
    whole = run_config(layers=4)
    cut = replace(whole, parallel=ParallelConfig(pipeline=2, virtual_pipeline=2))
    parts = [planned(cut, stage) for stage in range(4)]
    alone = planned(whole)
    tokens, hidden_states = 2 * 128 * 8, 2 * 128 * 256 * 2
    tables = 2 * 2 * 128 * 32 * 2  # rotary cosine and sine
    # Tokens, modality, positions, labels; the rows of the images, twice, and of the targets.
    batch = 4 * tokens + 2 * 2 * 16 * 8 + 2 * (128 - 16) * 8
    # Every later stage has a batch, tables, and once more the hidden states it received.
    extra = 3 * (batch + hidden_states + tables)
    assert sum(part.kept for part in parts) - alone.kept == pytest.approx(extra, rel=0.01)


def test_a_frozen_first_stage_is_still_asked_for_gradients():
    config = run_config(trainable=["decoder.layers.*"], layers=4)
    later = replace(config, parallel=ParallelConfig(pipeline=2))
    everything = run_config(layers=4)
    expected = planned(replace(everything, parallel=ParallelConfig(pipeline=2)), 1)
    assert planned(later, 1).kept == pytest.approx(expected.kept, rel=0.05)


@pytest.mark.parametrize(
    ("recompute", "units"),
    [
        # Gather and scatter around attention and MLP forward; backward the same and the MLP's
        # input once more.
        ("none", 4 + 5),
        # Once more forward, up to the last linear, whose result nobody asks for.
        ("full", 4 + 5 + 3),
    ],
)
def test_traffic_of_a_layer_is_counted_in_hidden_states(recompute, units):
    def sent(layers):
        config = run_config(layers=layers, tensor=2, sequence=True, recompute=recompute)
        return planned(config).sent["tensor"]

    hidden_states = 2 * 128 * 256 * 2
    assert sent(7) - sent(6) == units * hidden_states // 2


def test_collectives_are_those_that_the_model_calls():
    """All of a small model, recorded by torch's profiler in the same fake group."""
    config = run_config(layers=2, rows=1, tensor=2, context=2)
    vision = replace(config.model.vision, num_layers=2)
    abstractor = replace(config.model.abstractor, num_layers=2)
    config = replace(config, model=replace(config.model, vision=vision, abstractor=abstractor))
    with fake_process_groups(config.parallel, 4, 0) as groups:
        model = Owl2(ParallelContext(config, groups), config.model)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            model(*activations.example_batch(config, 1)).sum().backward()
    names = [event.name() for event in recorded.profiler.kineto_results.events()]
    calls = Counter(name.removeprefix("c10d::") for name in names if name.startswith("c10d::"))
    assert set(calls) == set(live_memory.RING)
    seen = 0
    original = live_memory.LiveMemory._send

    def count(self, name, args):
        nonlocal seen
        seen += 1
        original(self, name, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_memory.LiveMemory, "_send", count)
        activations.measure_activations(config, [1])
    assert seen == sum(calls.values())


@pytest.mark.parametrize(
    ("settings", "received"),
    [
        ({}, False),
        ({"recompute": "selective", "kv_heads": 2, "tensor": 2}, False),
        ({"recompute": "full", "trainable": STAGE_1}, False),
        ({"recompute": "full", "tensor": 4, "sequence": True, "precision": "fp32"}, False),
        ({"context": 2, "tensor": 2, "sequence": True}, False),
        ({"context": 2, "recompute": "selective", "trainable": ["decoder.*"]}, True),
        ({"recompute": "full", "trainable": ["output_layer.*"], "tensor": 2}, True),
    ],
    ids=str,
)
def test_passes_on_the_meta_device_are_those_on_tensors_that_claim_to_be_on_a_cpu(
    monkeypatch, settings, received
):
    """torch's fake tensors run a CPU's operations in full, a dozen times more slowly."""
    config = run_config(**settings)
    found = activations.measure_activations(config, (1, 2), received=received)
    fake = FakeTensorMode()
    monkeypatch.setattr(activations, "build_on_meta_device", lambda: fake)
    monkeypatch.setattr(activations, "run_on_meta_device", lambda: fake)
    monkeypatch.setattr(activations, "LiveMemory", FakeLiveMemory)
    assert activations.measure_activations(config, (1, 2), received=received) == found


class FakeLiveMemory(live_memory.LiveMemory):
    """LiveMemory of fake tensors: nothing is sent to the meta device and no kernel replaced."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            self._send(function._opname, args)
        self._add_all(results)
        return results


def test_rows_beyond_two_cost_what_a_pass_with_them_costs():
    config = run_config(rows=5, tensor=2, sequence=True)
    (five,) = activations.measure_activations(config, [5])
    layers = {"decoder": 3, "vision_model": 3, "abstractor": 3}
    direct, grown = five.pipeline_stage(layers, True, True), planned(config)
    assert (grown.kept, grown.shared, grown.sent) == (direct.kept, direct.shared, direct.sent)
    # A peak may grow faster once another moment has it.
    whole = direct.kept + direct.working
    assert grown.kept + grown.working == pytest.approx(whole, rel=0.05)
