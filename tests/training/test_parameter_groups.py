"""Parameter groups: what a stage trains and at which rate."""

import json
import sys

import prepared  # noqa: F401
import pytest
import torch
from megatron.core import parallel_state
from paths import EXAMPLES
from processes import run_ranks

from megatron_owl2.config.load import load_config
from megatron_owl2.config.schema import ParallelConfig, RunConfig, StageConfig
from megatron_owl2.errors import ConfigError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import Owl2, build
from megatron_owl2.model.parts import part_of
from megatron_owl2.training import parameter_groups

pytestmark = pytest.mark.distributed

VISION = {"ViT", "abstractor", "vision branch"}
LANGUAGE = {"embedding", "output layer", "decoder"}
PARALLELISMS = [  # of four ranks
    ["parallel.pipeline=2", "parallel.tensor=1"],
    ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.tensor=2"],
    ["parallel.pipeline=1", "parallel.tensor=2", "parallel.context=2"],
]


@pytest.fixture
def plan_of():
    def build(recipe: str, *overrides: str):
        config = load_config(EXAMPLES / recipe, [*overrides, "parallel.tensor=1"])
        model = Owl2(ParallelContext(config, setup.initialize(ParallelConfig())), config.model)
        return parameter_groups.freeze(config, [model]), model, config

    yield build
    setup.shutdown()


@pytest.mark.parametrize(
    "recipe, trained",
    [
        ("tiny/vision.yaml", VISION | LANGUAGE),
        ("tiny/text.yaml", LANGUAGE),
        ("tiny/chat.yaml", LANGUAGE),
        ("tiny/pretrain.yaml", VISION),
        ("tiny/finetune.yaml", VISION | LANGUAGE),
    ],
)
def test_the_recipes_train_the_parts_they_say(plan_of, recipe, trained):
    plan, model, _ = plan_of(recipe)
    found = {True: set(), False: set()}
    for parameter in plan:
        found[parameter.trained].add(part_of(parameter.name).parameter_group)
    assert found == {True: trained, False: (VISION | LANGUAGE) - trained}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        p.name: p.trained for p in plan
    }


def test_rates_fall_with_the_depth_of_the_vit(plan_of):
    rates = "stage.rates={'abstractor.*': 3, 'vision_model.layers.0.*': 2}"
    plan, _, config = plan_of("tiny/finetune.yaml", "optimizer.vision_layer_decay=0.5", rates)
    factors = {p.name: p.factor for p in plan}
    assert config.model.vision.num_layers == 4
    assert factors["vision_model.cls_token"] == 0.5**5
    assert factors["vision_model.layers.0.linear_qkv.weight"] == 2 * 0.5**4
    assert factors["vision_model.layers.3.linear_fc1.bias"] == 0.5
    assert factors["vision_model.post_layernorm.weight"] == 1
    assert factors["abstractor.vit_eos"] == 3
    assert factors["decoder.layers.0.mlp.linear_fc1.weight"] == 1


def test_the_table_counts_every_parameter_once(plan_of):
    plan, model, config = plan_of("tiny/pretrain.yaml")
    lines = parameter_groups.summary(plan, config).splitlines()
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lines[-1].split() == ["trained", f"{trained:,}", "of", f"{everything:,}"]
    assert sum(int(line[23:39].replace(",", "")) for line in lines[2:-1]) == everything
    assert sum(line.endswith("frozen") for line in lines) == 3


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (StageConfig(trainable=["abstracter.*"]), r"stage.trainable: pattern 'abstracter.\*'"),
        (StageConfig(frozen=["vision.*"]), r"stage.frozen: pattern 'vision.\*'"),
        (StageConfig(rates={"*.q": 2.0}), r"names look like abstractor.vit_eos, output_layer"),
        (StageConfig(frozen=["*"]), "nothing would train"),
    ],
)
def test_patterns_must_match_names_and_leave_something_to_train(stage, said):
    names = ["abstractor.vit_eos", "decoder.layers.0.mlp.linear_fc1.weight", "output_layer.weight"]
    parameter_groups.check_patterns(
        StageConfig(frozen=["output_*"], rates={"abstractor.*": 2.0}), names
    )
    with pytest.raises(ConfigError, match=said):
        parameter_groups.check_patterns(stage, names)


def test_plans_that_differ_have_other_fingerprints(plan_of):
    plans = [
        plan_of("tiny/finetune.yaml")[0],
        plan_of("tiny/pretrain.yaml")[0],
        plan_of("tiny/finetune.yaml", "optimizer.vision_layer_decay=0.9")[0],
        plan_of("tiny/finetune.yaml", "stage.rates={'abstractor.*': 2}")[0],
    ]
    assert len(set(map(parameter_groups.fingerprint, plans))) == 4
    assert parameter_groups.fingerprint(plans[0]) == parameter_groups.fingerprint(
        plan_of("tiny/finetune.yaml")[0]
    )


LAYERS = "model.decoder.num_layers=4"  # one or two for every chunk


def configured(overrides: list[str]) -> RunConfig:
    return load_config(EXAMPLES / "tiny" / "pretrain.yaml", [LAYERS, *overrides])


def plan_in_parallelisms():
    """Four ranks: what each of them plans in every parallelism, and of how many ranks it heard."""
    heard, gather = [], torch.distributed.all_gather_object

    def listen(shares, share, group=None):
        heard.append(len(shares))
        gather(shares, share, group)

    found = []
    for config in map(configured, PARALLELISMS):
        groups = setup.initialize(config.parallel)
        chunks = build(
            ParallelContext(config, groups), config.model, config.parallel.virtual_pipeline
        )
        torch.distributed.all_gather_object = listen
        plan = parameter_groups.freeze(config, chunks)
        torch.distributed.all_gather_object = gather
        found.append(
            [
                parameter_groups.fingerprint(plan),
                parameter_groups.summary(plan, config),
                heard.pop(),
            ]
        )
        parallel_state.destroy_model_parallel()
    everybody = [None] * 4
    gather(everybody, found)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(everybody), flush=True)


def test_every_rank_has_the_whole_plan_from_the_ranks_of_its_pipeline(plan_of):
    plan, _, config = plan_of("tiny/pretrain.yaml", LAYERS)
    whole = [parameter_groups.fingerprint(plan), parameter_groups.summary(plan, config)]
    run = run_ranks(4, __file__, "plan")
    assert run.returncode == 0, run.stderr[-2000:]
    everybody = json.loads(run.stdout.splitlines()[-1])
    for by_parallelism in everybody:
        assert by_parallelism == [[*whole, configured(o).parallel.pipeline] for o in PARALLELISMS]


if __name__ == "__main__" and sys.argv[1:] == ["plan"]:
    plan_in_parallelisms()
