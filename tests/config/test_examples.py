"""The recipes in examples/ are complete, consistent and what the paper says."""

import pytest
import torch
from paths import EXAMPLES

from megatron_owl2.config.load import load_config
from megatron_owl2.config.validate_model import validate_model
from megatron_owl2.config.validate_parallel import validate_parallel
from megatron_owl2.convert.mapping import rules
from megatron_owl2.convert.sources import weight_shapes
from megatron_owl2.mcore import setup


@pytest.mark.parametrize("name", [f"{p.parent.name}/{p.name}" for p in EXAMPLES.glob("*/*.yaml")])
def test_every_recipe_loads_and_fits_its_ranks(name):
    path = EXAMPLES / name
    config = load_config(path)
    validate_model(config.model)
    if path.stem != "model":
        validate_parallel(config, config.parallel.tensor * config.parallel.pipeline)


def test_only_stage_1_decodes_large_images_at_a_smaller_scale():
    stages = (load_config(EXAMPLES / f"7b/{name}.yaml").data for name in ("pretrain", "finetune"))
    assert [stage.scaled_decoding for stage in stages] == [True, False]


def test_the_7b_model_has_the_released_tensors_and_counts():
    config = load_config(EXAMPLES / "7b/finetune.yaml", ["parallel.tensor=1"])
    config.parallel.sequence = False
    shapes = weight_shapes(config)
    setup.shutdown()
    counts, tensors = dict.fromkeys(("LLaMA", "modality", "ViT", "abstractor"), 0), 0
    for rule in rules("owl2", config.model):
        if rule.constant:  # a position table
            shapes.pop(rule.ours)
            continue
        parts = rule.transform.split(torch.empty(shapes.pop(rule.ours), device="meta"))
        for name, part in zip(rule.theirs, parts, strict=True):
            kinds = {"multiway.1": "modality", "vision_model": "ViT", "abstractor": "abstractor"}
            kind = next((k for mark, k in kinds.items() if mark in name), "LLaMA")
            counts[kind] += part.numel()
            tensors += 1
    assert not shapes  # every parameter has its place among the released tensors
    assert tensors == 850
    assert list(counts.values()) == [6_738_415_616, 1_074_003_968, 303_966_208, 81_473_536]
    assert sum(counts.values()) == 8_197_859_328
