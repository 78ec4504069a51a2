"""The training loop on one GPU: like the CPU in fp32, and with every kernel in bf16."""

import gpu_model
import pytest
import stored
import tiny_run
import torch
from gpu_runs import FP32, train

from megatron_owl2.config.load import load_config
from megatron_owl2.training.checkpoint import directories

pytestmark = pytest.mark.gpu

WIDE = [  # sizes that FP8 GEMMs take
    "train.precision=bf16",
    "model.decoder.hidden_size=256",
    "model.decoder.num_heads=4",
    "model.decoder.num_kv_heads=4",
    "model.decoder.ffn_size=512",
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    config = tiny_run.make(folder, 3)
    train(config, folder / "initial", "train.steps=1", *FP32, cpu=True)
    return config, f"stage.initial_checkpoint={folder / 'initial'}"


def test_fp32_is_that_of_the_cpu(start, tmp_path):
    config, initial = start
    expected = train(config, tmp_path / "cpu", initial, *FP32, cpu=True)
    found = train(config, tmp_path / "gpu", initial, *FP32)
    for ours, reference in zip(found, expected, strict=True):
        assert ours == pytest.approx(reference, rel=2e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_the_same_batches(start, tmp_path, workers):
    config, initial = start
    figures = train(config, tmp_path / "gpu", initial, *FP32, f"data.workers={workers}")
    assert figures == train(config, tmp_path / "again", initial, *FP32, "data.workers=1")


@pytest.mark.parametrize("fp8", ["none", "tensorwise", "delayed", "blockwise"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_transformer_engine_trains_like_torch(start, tmp_path, fp8, recompute):
    config, _ = start
    common = [*WIDE, "train.seed=3", "optimizer.lr=1e-3", f"parallel.recompute={recompute}"]
    te = ["kernels.backend=transformer_engine", f"kernels.fp8={fp8}"]
    gpu_model.skip_unless_it_runs(load_config(config, [*common, *te]))
    expected = train(config, tmp_path / "torch", *common)
    found = train(config, tmp_path / "te", *common, *te)
    tolerance = 0.01 if fp8 == "none" else 0.05
    for ours, reference in zip(found, expected, strict=True):
        assert ours[1] == pytest.approx(reference[1], rel=tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "backend, parallelism",
    [
        ("local", "parallel.context=2"),
        ("local", "parallel.tensor=2 parallel.sequence=true"),
        ("transformer_engine", "parallel.context=2"),
        ("transformer_engine", "parallel.tensor=2 parallel.sequence=true"),
        (
            "transformer_engine",
            "parallel.tensor=2 parallel.sequence=true parallel.tensor_overlap=true",
        ),
    ],
)
def test_two_gpus_compute_what_one_does(start, tmp_path, backend, parallelism):
    if backend != "local":
        pytest.importorskip("transformer_engine.pytorch", exc_type=Exception)
    config, _ = start
    common = [*WIDE, "train.seed=3", "optimizer.lr=1e-3", f"kernels.backend={backend}"]
    expected = train(config, tmp_path / "one", *common)
    found = train(config, tmp_path / "two", *common, *parallelism.split(), processes=2)
    for ours, reference in zip(found, expected, strict=True):
        assert ours[1] == pytest.approx(reference[1], rel=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_context_parallel_attention_leaves_the_gradients_of_one_gpu(start, tmp_path, backend):
    if backend != "local":
        pytest.importorskip("transformer_engine.pytorch", exc_type=Exception)
    config, _ = start
    # With beta1 = 0 the first moment is the gradient (tests/training/test_parallel.py).
    common = [*WIDE, "train.seed=3", "train.steps=1", "optimizer.beta1=0", "optimizer.clip_grad=0"]
    common += [f"kernels.backend={backend}", "optimizer.lr=1e-3"]
    found = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        train(config, run, *common, f"parallel.context={processes}", processes=processes)
        found.append(stored.read(directories.resolve(run), stored.MOMENT))
    one, two = found
    assert one.keys() == two.keys()
    largest = max(float(gradient.norm()) for gradient in one.values())
    for name, gradient in one.items():
        if gradient.norm() > 1e-3 * largest:  # smaller ones are rounding of bf16
            assert float((two[name] - gradient).norm() / gradient.norm()) < 0.05, name
