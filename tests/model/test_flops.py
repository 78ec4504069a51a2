"""FLOPs by the mathematics of the model against torch's own count of its real passes."""

import pytest
from small_configs import STAGE_1, run_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_owl2.config.schema import LoraConfig
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model import flops
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.model.parts import FLOPS_GROUPS
from megatron_owl2.planner import activations
from megatron_owl2.training import parameter_groups

ROWS, LENGTH = 2, 128
MODULES = ("vision_model", "abstractor", "decoder", "output_layer")  # of FLOPS_GROUPS


def counted(config) -> tuple[dict[str, float], set[str]]:
    """Operations of a real forward and backward pass by part, and the names of what trains."""
    context = ParallelContext(config, setup.initialize(config.parallel))
    model = Owl2(context, config.model)
    trained = {
        name
        for name, _ in model.named_parameters()
        if parameter_groups.is_trainable(name, config.stage)
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trained
    counter = FlopCounterMode(model, display=False)
    # The counter knows no flash attention on CPUs; the plain one computes all pairs.
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(*activations.example_batch(config, ROWS)).sum().backward()
    setup.shutdown()
    found = {}
    for group, name in zip(FLOPS_GROUPS, MODULES, strict=True):
        found[group] = float(sum(counter.get_flop_counts()[f"Owl2.{name}"].values()))
    assert sum(found.values()) == counter.get_total_flops()
    return found, trained


def load(config) -> flops.Load:
    """All tokens are real and see all others, as the plain attention computes it."""
    vision = ROWS * config.model.tokens_per_image
    tokens = ROWS * LENGTH
    return flops.Load(ROWS, tokens, vision, tokens - vision, pairs=tokens * LENGTH)


@pytest.mark.parametrize(
    ("trainable", "split"),
    [
        (["*"], ["input_norm", "key_value", "mlp_norm"]),
        (STAGE_1, ["input_norm", "key_value", "mlp_norm"]),
        (["decoder.*"], []),
        (["output_layer.*"], []),
    ],
)
def test_training_flops_are_those_of_the_real_passes(trainable, split):
    config = run_config(precision="fp32", kv_heads=2)
    config.model.decoder.modality_split = split
    config.stage.trainable = trainable
    real, trained = counted(config)
    planned = flops.training_flops(config.model, load(config), trained)
    if split:
        # The model runs text keys and values on vision rows, too, and overwrites them.
        decoder = config.model.decoder
        numel = 2 * decoder.hidden_size * decoder.hidden_size // decoder.num_heads * 2
        rows = ROWS * config.model.tokens_per_image * decoder.num_layers
        weight = "decoder.layers.0.attention.qkv.linear_qkv.weight"
        begins = any(not name.startswith(("final_norm", "output_layer")) for name in trained)
        planned["decoder"] += 2.0 * numel * rows * (1 + begins + (weight in trained))
        # The backward pass of a split norm sums by modality with a matrix product.
        sums = 2 * 2 * ROWS * LENGTH * decoder.hidden_size
        planned["decoder"] += 2.0 * decoder.num_layers * sums * begins
    assert planned == real


def test_adapters_count_like_other_products():
    config = run_config(precision="fp32", kv_heads=2, trainable=["vision_model.cls_token"])
    config.model.decoder.modality_split = []
    config.stage.lora = LoraConfig(["*"], rank=8)
    real, trained = counted(config)
    found = flops.training_flops(config.model, load(config), trained, config.stage.lora)
    assert found["decoder"] == real["decoder"]
    config.model.decoder.modality_split = ["key_value"]
    split = flops.training_flops(config.model, load(config), set(), config.stage.lora)
    without = flops.training_flops(config.model, load(config), set())
    decoder, here = config.model.decoder, load(config)
    size, kv = decoder.hidden_size, decoder.hidden_size // decoder.num_heads * 2
    sizes = 2 * (2 * size) + 2 * (size + kv) + 3 * (size + decoder.ffn_size)
    assert split["decoder"] - without["decoder"] == 2 * 8 * sizes * here.tokens * 3


def test_recomputation_adds_a_forward_pass_of_the_layers():
    names = {"vision_model.cls_token", "decoder.layers.0.mlp.linear_fc1.weight"}
    model = run_config().model
    here = load(run_config())
    forward = flops.training_flops(model, here, set())
    full = flops.forward_again(model, here, names, "full")
    assert full["decoder"] == forward["decoder"] and full["output layer"] == 0
    assert 0 < full["ViT"] < forward["ViT"]  # the patches are not in a layer
    selective = flops.forward_again(model, here, names, "selective")
    assert selective["decoder"] == 4 * here.pairs * 3 * 256
    assert not any(flops.forward_again(model, here, names, "none").values())
    later = flops.forward_again(model, here, {"decoder.layers.0.mlp.linear_fc1.weight"}, "full")
    assert later["ViT"] == later["abstractor"] == 0


def test_causal_pairs_and_frozen_weights_of_the_recipe_by_hand():
    model = run_config().model
    here = flops.Load(images=0, tokens=4, vision_tokens=0, targets=3, pairs=10)
    found = flops.training_flops(model, here, {"output_layer.weight"})
    width, ffn = 256, 688
    layer = 4 * (4 * width * width + 3 * width * ffn) * 2 + 4 * 10 * width
    assert found == {
        "ViT": 0,
        "abstractor": 0,
        "decoder": 3 * layer,
        "output layer": 3 * 2 * 3 * width * 1024,
    }
