"""Plans on a machine where torch sees GPUs: the same numbers, and no GPU is touched."""

import json

import pytest
import torch
from processes import run_ranks
from small_configs import run_config

pytestmark = pytest.mark.slow


def refuse(*_, **__):
    raise RuntimeError("a plan has touched a GPU")


def pretend_gpus() -> None:
    """torch sees 8 GPUs, and whatever would start CUDA raises."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 8
    torch.cuda.current_device = torch.cuda._lazy_init = refuse


def costs() -> list:
    """What the plans of three parallel configurations find out by building and running models."""
    from megatron_owl2.mcore.setup import setup

    setup()
    from megatron_owl2.planner.activations import ActivationCosts
    from megatron_owl2.planner.static_memory import check_sharding, model_weights

    found = []
    for parallelism in ({"tensor": 2, "sequence": True}, {"context": 2}, {"pipeline": 2}):
        config = run_config(layers=2, **parallelism)
        weights = model_weights(config)
        activations = ActivationCosts(weights)
        stages = range(config.parallel.pipeline)
        found += [vars(activations(config, stage)) for stage in stages]
        found.append(check_sharding(config, 4, weights))
    return found


def test_plans_beside_a_gpu_are_those_without_one_and_touch_none():
    run = run_ranks(1, __file__, fresh=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout) == json.loads(json.dumps(costs()))


if __name__ == "__main__":
    pretend_gpus()
    print(json.dumps(costs()))
