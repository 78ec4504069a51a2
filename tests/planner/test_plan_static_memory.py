"""The plan's parameters, gradients and optimizer states against the tensors of real ranks."""

import json
import sys
from dataclasses import replace

import prepared  # noqa: F401
import pytest
import torch
import yaml
from megatron.core import parallel_state
from paths import EXAMPLES
from processes import run_ranks
from tiny_run import MODEL
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_owl2.config.load import load_config
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import build
from megatron_owl2.planner import static_memory as weights
from megatron_owl2.planner.fake_process_groups import fake_process_groups
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training import parameter_groups

pytestmark = pytest.mark.distributed

RECIPES = EXAMPLES / "7b"
STAGE_1 = 'stage.trainable=["vision_model.*", "abstractor.*", "*_vision.weight", "*_vision"]'
PARALLELISMS = {  # overrides of the tiny run on four ranks
    "data, fp32": ["train.precision=fp32"],
    "tensor, stage 1": ["parallel.tensor=2", "parallel.sequence=true", STAGE_1],
    "tensor x pipeline": ["parallel.tensor=2", "parallel.pipeline=2"],
    "uneven": ["parallel.pipeline=2", "parallel.layers=[1,3]"],
    "virtual": ["parallel.pipeline=2", "parallel.virtual_pipeline=2", STAGE_1],
    "context": ["parallel.context=2"],
}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL, "train": {"precision": "bf16"}}))
    return path


def wrapped_model(config: RunConfig, groups):
    chunks = build(ParallelContext(config, groups), config.model, config.parallel.virtual_pipeline)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad = parameter_groups.is_trainable(name, config.stage)
            parameter.rate_factor = 1.0
    return optim.wrap_ddp(chunks, overlap=config.parallel.overlap)


def bytes_of(tensors) -> int:
    """Of the storages under the tensors, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def parameters_and_gradients(wrapped) -> tuple[int, int]:
    parameters = bytes_of([p for chunk in wrapped for p in chunk.parameters()])
    gradients = [b.grad_data for chunk in wrapped for b in chunk.buffers]
    return parameters, bytes_of(gradients)


def weigh_configurations(path: str):
    """Four ranks: what each configuration holds after a step, one line of JSON from rank 0."""
    for name, overrides in PARALLELISMS.items():
        config = load_config(path, overrides)
        wrapped = wrapped_model(config, setup.initialize(config.parallel))
        optimizer, _ = optim.build_optimizer(config, wrapped)
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.step()
        parts = [part.optimizer for part in optimizer.chained_optimizers]
        states = [state for part in parts for state in part.state.values()]
        tensors = [s[key] for s in states for key in ("exp_avg", "exp_avg_sq")]
        if config.train.precision == "bf16":  # else they are views of the model's
            tensors += [p for part in parts for group in part.param_groups for p in group["params"]]
        share = [*parameters_and_gradients(wrapped), sum(t.nbytes for t in tensors)]
        shares = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, share)
        if torch.distributed.get_rank() == 0:
            print(json.dumps([name, shares]), flush=True)
        parallel_state.destroy_model_parallel()


def test_bytes_equal_those_of_real_ranks_after_a_step(tiny):
    run = run_ranks(4, __file__, tiny)
    assert run.returncode == 0, run.stderr[-2000:]
    real = dict(json.loads(line) for line in run.stdout.splitlines() if line.startswith("["))
    assert real.keys() == PARALLELISMS.keys()
    for name, overrides in PARALLELISMS.items():
        config = load_config(tiny, overrides)
        planned = weights.static_memory(config, 4, weights.model_weights(config))
        pipeline = config.parallel.pipeline
        for rank, expected in enumerate(planned):
            shares = real[name][4 // pipeline * rank : 4 // pipeline * (rank + 1)]
            for parameters, gradients, _ in shares:
                assert (expected.parameters, expected.gradients) == (parameters, gradients), name
            assert expected.optimizer == max(share[2] for share in shares), name


@pytest.mark.parametrize(
    ("recipe", "overrides", "world_size"),
    [
        ("finetune", ["parallel.tensor=2"], 1024),  # buckets of 512 million numbers
        ("finetune", ["parallel.overlap=false", "parallel.tensor=4"], 96),
        ("pretrain", ["parallel.pipeline=4", "parallel.virtual_pipeline=2"], 48),
        ("pretrain", ["parallel.tensor=8", "parallel.sequence=true"], 8),
    ],
)
def test_bytes_of_the_7b_model_equal_its_gradient_buffers(recipe, overrides, world_size):
    config = load_config(RECIPES / f"{recipe}.yaml", overrides)
    planned = weights.static_memory(config, world_size, weights.model_weights(config))
    for rank, expected in enumerate(planned):
        first = world_size // config.parallel.pipeline * rank
        with (
            fake_process_groups(config.parallel, world_size, first) as groups,
            FakeTensorMode(),  # no memory, but all sizes
        ):
            wrapped = wrapped_model(config, groups)
            found = parameters_and_gradients(wrapped)
            assert (expected.parameters, expected.gradients) == found


def test_the_fullest_optimizer_share_is_found():
    # 5 + 5 numbers at 0 and 64, padded to 128 of 4 ranks: ranks 0 and 2 have 5 each.
    (bucket,) = weights._buckets([5, 5], None, 4)
    assert bucket == (0, 128, [(0, 5), (64, 69)])
    assert weights._elements_per_rank(*bucket, 4).tolist() == [5, 0, 5, 0]
    # Three ranks share 384 numbers, 100 of the last parameter first.
    (bucket,) = weights._buckets([150, 100], None, 3)
    assert bucket[:2] == (0, 384)
    assert weights._elements_per_rank(*bucket, 3).tolist() == [100, 128, 22]
    # A limit closes a bucket once it is reached; the next begins behind the padding.
    first, second = weights._buckets([10, 60, 70], 100, 2)
    assert first == (0, 256, [(0, 70), (128, 188)]) and second[:2] == (256, 384)


def test_the_whole_model_is_inventoried_once():
    found = weights.model_weights(load_config(RECIPES / "finetune.yaml"))
    assert sum(weight.numel for weight in found) == 8_197_859_328
    assert len({weight.name for weight in found}) == len(found)
    config = load_config(RECIPES / "pretrain.yaml", ["model.vision.image_size=448"])
    found = weights.model_weights(config)
    assert sum(weight.numel for weight in found) == 8_197_859_328
    trained = {weight.name for weight in found if weight.trained}
    assert not any("linear_qkv" in name and name.startswith("decoder") for name in trained)


@pytest.mark.parametrize("fp8", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_fp8_holds_every_matrix_of_the_decoder_twice_more(fp8):
    parallel = ["parallel.tensor=4", "parallel.pipeline=2", "parallel.layers=[15,17]"]
    kernels = ["kernels.backend=transformer_engine", f"kernels.fp8={fp8}"]
    config = load_config(RECIPES / "finetune.yaml", parallel)
    whole = weights.model_weights(config)
    plain = weights.static_memory(config, 64, whole)
    found = weights.static_memory(
        load_config(RECIPES / "finetune.yaml", parallel + kernels), 64, whole
    )
    # Queries, keys, values, keys and values of vision, output; gate, up and down.
    layer = 6 * 4096**2 + 3 * 4096 * 11008
    for layers, ours, without in zip((15, 17), found, plain, strict=True):
        assert ours.copies == 2 * layers * layer // 4 == ours.total - without.total
        assert without.copies == 0


@pytest.mark.parametrize(
    ("overrides", "world_size", "stages"),
    [
        ([], 1024, 1),
        (["parallel.tensor=8", "parallel.pipeline=4", "parallel.virtual_pipeline=4"], 4096, 16),
    ],
)
def test_sharding_is_checked_among_thousands_of_ranks(overrides, world_size, stages):
    config = load_config(RECIPES / "finetune.yaml", overrides)
    whole = weights.model_weights(config)
    words = weights.check_sharding(config, world_size, whole)
    assert f"{world_size:,} ranks: {stages} pipeline stage" in words and "8,197,859,328" in words


def test_a_wrong_shard_is_found(tiny):
    config = load_config(tiny, ["parallel.tensor=2"])
    whole = weights.model_weights(config)
    wrong = [replace(whole[0], split=True), *whole[1:]]
    with pytest.raises(RuntimeError, match=r"stage 0 has \('vision_model.cls_token', 32\)"):
        weights.check_sharding(config, 1024, wrong)
    with pytest.raises(RuntimeError, match="the plan None"):
        weights.check_sharding(config, 1024, whole[:-1])


def test_a_process_in_a_group_can_have_no_fake_groups():
    config = RunConfig()
    with (
        fake_process_groups(config.parallel, 2, 1) as groups,
        pytest.raises(RuntimeError, match="process group already"),
        fake_process_groups(config.parallel, 2, 0),
    ):
        pass
    assert groups.dp is not None and not torch.distributed.is_initialized()


if __name__ == "__main__":
    weigh_configurations(sys.argv[1])
