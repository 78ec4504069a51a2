"""The table of model parts against the model, and the groups that are derived from it."""

import pytest
from small_configs import run_config

from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model import parts
from megatron_owl2.model.layer_stack import LayerStack
from megatron_owl2.model.owl2 import Owl2


@pytest.fixture(scope="module")
def model():
    config = run_config()
    config.stage.lora.targets = ["*"]
    yield Owl2(ParallelContext(config, setup.initialize(config.parallel)), config.model)
    setup.shutdown()


def test_every_parameter_belongs_to_a_part_and_every_part_has_one(model):
    found = {parts.part_of(name).name for name, _ in model.named_parameters()}
    assert found == {part.name for part in parts.PARTS}
    with pytest.raises(KeyError, match="audio.* belongs to no part"):
        parts.part_of("audio_model.layers.0.weight")


def test_stacks_are_the_modules_with_layers(model):
    stacks = [name for name, child in model.named_children() if hasattr(child, "layers")]
    assert list(parts.STACKS) == stacks
    assert all(isinstance(getattr(model, name).layers, LayerStack) for name in stacks)


def test_groups_are_those_of_the_metrics_and_tables():
    """These names are in metrics.jsonl and in plans: whoever reads them must find them again."""
    assert parts.PARAMETER_GROUPS == (
        "ViT",
        "abstractor",
        "vision branch",
        "embedding",
        "output layer",
        "decoder",
        "adapters",
    )
    assert parts.GRAD_NORM_GROUPS == ("ViT", "abstractor", "vision KV", "text KV", "rest")
    assert parts.FLOPS_GROUPS == ("ViT", "abstractor", "decoder", "output layer")
    assert all(parts.find_part(group).flops_group == group for group in parts.FLOPS_GROUPS)
    with pytest.raises(KeyError):
        parts.find_part("vision branch")


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("vision_model.layers.0.linear_qkv.weight", ("ViT", "ViT", "ViT", "first")),
        ("abstractor.vit_eos", ("abstractor", "abstractor", "abstractor", "first")),
        (
            "decoder.layers.1.attention.qkv.linear_kv_vision.weight",
            ("vision branch", "vision KV", "decoder", "layers"),
        ),
        (
            "decoder.layers.1.input_norm.weight_vision",
            ("vision branch", "rest", "decoder", "layers"),
        ),
        ("decoder.layers.1.input_norm.weight_text", ("decoder", "rest", "decoder", "layers")),
        (
            "decoder.layers.1.attention.qkv.linear_qkv.weight",
            ("decoder", "text KV", "decoder", "layers"),
        ),
        ("embedding.weight", ("embedding", "rest", "decoder", "first")),
        ("final_norm.weight", ("decoder", "rest", "output layer", "last")),
        ("output_layer.weight", ("output layer", "rest", "output layer", "last")),
    ],
)
def test_parameters_are_where_they_were(name, groups):
    part = parts.part_of(name)
    found = part.parameter_group, part.grad_norm_group, part.flops_group, part.pipeline
    assert found == groups
