"""Models built for a checkpoint: all that the others have, but for the values of the weights."""

import small_configs
import torch
from torch.overrides import TorchFunctionMode

from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model import position_tables
from megatron_owl2.model.layer_stack import LayerStack, weights
from megatron_owl2.model.owl2 import build
from megatron_owl2.planner.fake_process_groups import fake_process_groups


class _Nan(TorchFunctionMode):
    """Function mode in which memory without values holds NaN."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        return made.fill_(float("nan")) if func is torch.empty else made


def built(config, **options):
    with fake_process_groups(config.parallel, config.parallel.tensor, rank=1) as groups:
        context = ParallelContext(config, groups, **options)
        return build(context, config.model), build(context, config.model, initialize=False)


def marks(model):
    return {name: vars(parameter) for name, parameter in model.named_parameters()}


def test_nothing_differs_but_the_values_of_weights():
    config = small_configs.run_config(tensor=2, sequence=True)
    (expected,), (found,) = built(config)
    sizes = [{n: (w.shape, w.dtype) for n, w in weights(m).items()} for m in (expected, found)]
    assert sizes[0] == sizes[1]
    assert marks(found) == marks(expected)
    split = {name for name, mark in marks(found).items() if mark.get("tensor_model_parallel")}
    assert {"embedding.weight", "output_layer.weight"} < split and len(split) > 30
    assert marks(found)["decoder.layers.0.mlp.linear_fc1.weight"]["partition_stride"] == 2
    assert [p.requires_grad for p in found.parameters()] == [
        p.requires_grad for p in expected.parameters()
    ]
    for name, buffer in expected.named_buffers():  # tables and constants
        assert found.get_buffer(name).equal(buffer), name
    assert expected.image_mean.flatten().tolist() != [0.0] * 3


def test_no_random_number_is_drawn_and_no_value_written():
    config = small_configs.run_config()
    setup.initialize(config.parallel)
    context = ParallelContext(config, setup.initialize(config.parallel))
    before = torch.get_rng_state()
    with _Nan():
        (model,) = build(context, config.model, initialize=False)
    assert torch.get_rng_state().equal(before)
    names = {n for n, weight in weights(model).items() if not weight.isnan().any()}
    norms = {n for n, p in model.named_parameters() if "norm" in n or "ffn_ln" in n}
    assert names <= norms | set(position_tables.NAMES)
    torch.manual_seed(0)
    (other,) = build(context, config.model)
    assert not torch.get_rng_state().equal(before)  # values are drawn again after it
    assert all(p.isfinite().all() for p in other.parameters())


def test_layers_go_to_their_device_as_they_are_built(monkeypatch):
    """With two layers at a time elsewhere a model would need room for itself there."""
    config = small_configs.run_config()
    context = ParallelContext(
        config, setup.initialize(config.parallel), device=torch.device("meta")
    )
    left: list[int] = []
    place = ParallelContext.place

    def watched(self, module):
        left.append(sum(p.numel() for p in module.parameters() if not p.is_meta))
        return place(self, module)

    monkeypatch.setattr(ParallelContext, "place", watched)
    (model,) = build(context, config.model)
    assert all(parameter.is_meta for parameter in model.parameters())
    stacks = [m for m in model.modules() if isinstance(m, LayerStack)]
    layers = [sum(p.numel() for p in layer.parameters()) for s in stacks for layer in s]
    assert left[:-1] == layers  # one whole layer each time
    assert left[-1] == sum(p.numel() for p in model.parameters()) - sum(layers)
