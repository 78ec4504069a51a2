"""LoRA: targets by name, adapters that add nothing at first, masks that follow the token alone."""

import pytest
import torch
from small_configs import run_config

from megatron_owl2.config import lora
from megatron_owl2.config.schema import DecoderConfig, LoraConfig, ParallelConfig, RunConfig
from megatron_owl2.config.validate import validate_settings
from megatron_owl2.errors import ConfigError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.dropout import keep_mask, token_keys
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.planner.activations import example_batch
from megatron_owl2.planner.static_memory import model_weights
from megatron_owl2.training import parameter_groups


@pytest.fixture(autouse=True)
def leaves_its_groups():
    yield
    setup.shutdown()  # plans are made outside of any


EVERY = LoraConfig(["*"], rank=4, alpha=8.0)


def config_of(adapters: LoraConfig, trainable=(), **options) -> RunConfig:
    config = run_config(
        precision="fp32", trainable=trainable, hidden=64, length=64, layers=2, **options
    )
    config.stage.lora, config.model.init_std = adapters, 0.1
    return config


def build(config: RunConfig) -> Owl2:
    torch.manual_seed(0)
    return Owl2(ParallelContext(config, setup.initialize(ParallelConfig())), config.model)


def batch(rows: int = 2) -> list[torch.Tensor]:
    """Text and an image in every row, and at the end the numbers of the samples."""
    config = config_of(LoraConfig())
    torch.manual_seed(1)
    tokens, image, index, modality, *_ = example_batch(config, rows)
    tokens = torch.randint(1, config.model.decoder.vocab_size, tokens.shape)
    image = torch.randint(0, 255, image.shape, dtype=torch.uint8)
    index = torch.arange(len(index)).view(-1, rows).t().flatten()  # image after image
    modality[:, : len(index) // rows] = 1
    positions, labels = torch.arange(tokens.shape[1]).expand(rows, -1), tokens.roll(-1, 1)
    targets = torch.arange(len(index), tokens.numel())
    return [
        tokens,
        image,
        index,
        modality,
        positions,
        labels,
        targets,
        index,
        torch.tensor([5, 2**33 + 1])[:rows],
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_new_adapters_change_no_bit_of_the_losses(dropout):
    plain = build(config_of(LoraConfig()))(*batch())
    adapted = build(config_of(LoraConfig(["*"], 4, 8.0, dropout)))
    assert sum(map(lora.is_adapter, dict(adapted.named_parameters()))) == 2 * 9 * 2
    assert torch.equal(adapted(*batch()), plain)


def test_an_adapter_is_the_product_of_its_matrices():
    """Against the sum written out, with weights that are moved by it."""
    config = config_of(EVERY)
    model, merged = build(config), build(config_of(LoraConfig()))
    torch.manual_seed(2)
    weights = dict(merged.named_parameters())
    decoder = config.model.decoder
    head, groups = decoder.hidden_size // decoder.num_heads, decoder.num_kv_heads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if lora.is_adapter(name):
                parameter.normal_(std=0.05)
        deltas = {}
        for target in lora.selected(EVERY, decoder):
            a, b = (model.get_parameter(name) for name in lora.parameters(target))
            deltas.setdefault(lora.linear_weight(target), []).append(8.0 / 4 * b @ a)
        for name, found in deltas.items():
            if "linear_qkv" in name or "kv_vision" in name:  # by groups of heads
                found = [d.view(groups, -1, d.shape[-1]) for d in found]
                assert all(d.shape[1] % head == 0 for d in found)
                weights[name] += torch.cat(found, dim=1).flatten(0, 1)
            else:
                weights[name] += torch.cat(found)
        ours, expected = model(*batch()), merged(*batch())
        plain = build(config_of(LoraConfig()))(*batch())
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_masks_follow_the_sample_and_no_random_state():
    config = config_of(LoraConfig(["*.query", "*.down"], 4, 8.0, 0.5))
    model, given = build(config), batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.5)
        first = model(*given)
        assert torch.equal(model(*given), first)
        others = [*given[:-1], torch.tensor([5, 2**33 + 2])]
        moved = [loss.view(-1, 2) for loss in (first, model(*others))]
        rows = (0, 1, 5, 8)  # tokens, image, labels and samples
        swapped = model(*[part.flip(0) if n in rows else part for n, part in enumerate(given)])
        without = model.eval()(*given)
    assert torch.equal(moved[0][:, 0], moved[1][:, 0])  # the first sample is as it was
    assert (moved[0][:, 1] - moved[1][:, 1]).abs().max() > 1e-3
    torch.testing.assert_close(swapped.view(-1, 2).flip(1).flatten(), first)
    assert (without - first).abs().max() > 1e-3
    assert torch.equal(without, model.train()(*given[:-1]))


def test_masks_are_even_and_independent():
    context = build(config_of(LoraConfig(["*"], 4, 8.0, 0.25))).context
    keys = token_keys(context, torch.arange(16), 32)
    channels = torch.arange(256, dtype=torch.int32)
    masks = torch.stack([keep_mask(keys, channels, key, 0.25) for key in (1, 2**40)]).double()
    assert masks.mean() == pytest.approx(0.75, abs=0.005)
    for dimension in range(1, 4):  # places, samples, channels
        others = [d for d in range(1, 4) if d != dimension]
        spread = (
            masks.mean(others).std() / (0.1875 / masks[0].numel() * masks.shape[dimension]) ** 0.5
        )
        assert 0.6 < spread < 1.4, dimension
    centred = (masks - 0.75).flatten(1)
    assert abs(float((centred[0] * centred[1]).mean())) < 0.005
    shifted = masks[0] - 0.75
    for dimension in range(3):
        assert abs(float((shifted * shifted.roll(1, dimension)).mean())) < 0.005
    rank = keep_mask(keys, channels[100:], 1, 0.25)  # the channels of another rank
    assert torch.equal(rank, masks[0, ..., 100:].bool())


def test_targets_are_the_linears_of_peft():
    decoder = DecoderConfig(num_layers=2)
    found = lora.selected(LoraConfig(["*.1.attention.query", "*.1.mlp.*", "*vision"]), decoder)
    assert found == [
        "decoder.layers.0.attention.key_vision",
        "decoder.layers.0.attention.value_vision",
        "decoder.layers.1.attention.query",
        "decoder.layers.1.attention.key_vision",
        "decoder.layers.1.attention.value_vision",
        "decoder.layers.1.mlp.gate",
        "decoder.layers.1.mlp.up",
        "decoder.layers.1.mlp.down",
    ]
    for target in lora.target_names(decoder):
        assert {lora.target_of(name) for name in lora.parameters(target)} == {target}
    decoder.modality_split = []
    assert not any(name.endswith("vision") for name in lora.target_names(decoder))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": ["*.q_proj"]}, r"stage.lora.targets: pattern '\*.q_proj' matches no linear"),
        ({"targets": ["*"], "dropout": 1.0}, r"stage.lora.dropout \(1.0\) must be below 1"),
        ({"targets": ["*"], "rank": 0}, "stage.lora.rank is 0; it must be"),
    ],
)
def test_what_cannot_be_is_refused(changed, message):
    config = config_of(LoraConfig(**changed))
    config.data.sequence_length = 80
    with pytest.raises(ConfigError, match=message):
        validate_settings(config, 1)


def test_a_weight_under_an_adapter_does_not_train():
    names = [weight.name for weight in model_weights(config_of(EVERY))]
    stage = config_of(EVERY, trainable=["*"]).stage
    with pytest.raises(ConfigError, match=r"stage.trainable trains decoder.layers.0.*linear_qkv"):
        parameter_groups.check_patterns(stage, names)
    stage.frozen = ["decoder.layers.*"]  # the adapters as well
    parameter_groups.check_patterns(stage, names)


def test_the_plan_and_the_table_count_adapters():
    config = config_of(EVERY, trainable=["abstractor.vit_eos"])
    trained = {w.name: w for w in model_weights(config) if w.trained}
    adapters = {name for name in trained if lora.is_adapter(name)}
    assert trained.keys() - adapters == {"abstractor.vit_eos"} and len(adapters) == 36
    split = {name for name in adapters if trained[name].split}
    rows = (".output.lora_A", ".down.lora_A")
    assert split == {n for n in adapters if n.endswith(rows) or n.endswith("lora_B")} - {
        n.replace("lora_A", "lora_B") for n in adapters if n.endswith(rows)
    }
    (line,) = [
        line
        for line in parameter_groups.summary(
            parameter_groups.freeze(config, [build(config)]), config
        ).splitlines()
        if line.startswith("adapters")
    ]
    assert f"{sum(trained[name].numel for name in adapters):,}" in line and "36" in line
