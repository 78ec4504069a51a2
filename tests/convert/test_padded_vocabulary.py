"""Vocabularies that tensor parallelism does not divide: padded here, trimmed in directories."""

import json
from pathlib import Path

import padded_vocabulary
import pytest
import torch
from exported import build
from hf_dirs import (
    CLIP,
    LLAMA,
    OWL2,
    assert_same,
    editable,
    parts_config,
    run_tool,
    small_tokenizer,
    tensors_of,
)
from paths import HELPERS
from processes import run_ranks
from safetensors.torch import save_file

from megatron_owl2.config.schema import (
    AbstractorConfig,
    DecoderConfig,
    ModelConfig,
    RunConfig,
    VisionConfig,
)
from megatron_owl2.config.validate_parallel import validate_parallel
from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.sources import from_checkpoint, from_llama_and_clip, from_released
from megatron_owl2.convert.verify.compare import compare
from megatron_owl2.convert.verify.verify import Verification
from megatron_owl2.errors import CheckpointError, ConfigError
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import load_model
from megatron_owl2.model.flops import Load, training_flops
from megatron_owl2.model.layer_stack import weights

pytestmark = pytest.mark.distributed

ADDED = 323  # pieces: a LLaMA's and a few that were added
PADDED = ("embedding.weight", "output_layer.weight")


def cut(source: Path, directory: Path, rows: int) -> Path:
    """The model in `source` with the first `rows` of its vocabulary."""
    editable(source, directory, vocab_size=rows)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tensors = tensors_of(source)
    tensors = {n: t[:rows].clone() if n in names else t for n, t in tensors.items()}
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    directory = cut(OWL2, folder / "hf", ADDED)
    small_tokenizer(folder).rename(directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="module")
def checkpoint(directory) -> Path:
    whole = from_released(directory)
    write_checkpoint(directory.parent / "ckpt", whole.tensors, whole.config)
    return directory.parent / "ckpt"


@pytest.fixture(scope="module")
def on_two_ranks(checkpoint, directory) -> Path:
    folder = directory.parent / "two ranks"
    folder.mkdir()
    done = run_ranks(2, HELPERS / "padded_vocabulary.py", checkpoint, directory, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("multiple", "rows"), [(1, 323), (8, 328), (128, 384), (323, 323)])
def test_there_and_back_is_bitwise(directory, tmp_path, multiple, rows):
    config = from_released(directory).config
    config.model.decoder.vocab_multiple = multiple
    whole = from_released(directory, config=config)
    write_checkpoint(tmp_path / "ckpt", whole.tensors, whole.config)
    whole = from_checkpoint(tmp_path / "ckpt")
    for name in PADDED:
        weight = whole.tensors[name].read()
        assert weight.shape == whole.tensors[name].shape == (rows, 64)
        assert not weight[ADDED:].any() and weight[:ADDED].any(1).all()
    export_hf(whole.tensors, whole.config.model, tmp_path / "out")
    stored = tensors_of(directory)
    assert_same(
        tensors_of(tmp_path / "out"), {n: t for n, t in stored.items() if "inv_freq" not in n}
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == ADDED


def test_a_checkpoint_from_before_the_multiple_loads_with_one(directory, tmp_path):
    config = from_released(directory).config
    config.model.decoder.vocab_multiple = 1
    whole = from_released(directory, config=config)
    write_checkpoint(tmp_path / "ckpt", whole.tensors, whole.config)
    settings = tmp_path / "ckpt" / "run.yaml"
    kept = settings.read_text()
    settings.write_text(kept.replace("    vocab_multiple: 1\n", ""))
    assert settings.read_text() != kept
    with pytest.raises(CheckpointError) as refusal:
        from_checkpoint(tmp_path / "ckpt")
    assert "embedding.weight is (323, 64) in the checkpoint, (328, 64)" in str(refusal.value)
    assert "model.decoder.vocab_multiple, which is 1 for a checkpoint whose" in str(refusal.value)
    settings.write_text(kept)
    assert from_checkpoint(tmp_path / "ckpt").tensors[PADDED[0]].shape == (323, 64)


def test_the_command_lines_take_a_multiple(directory, tmp_path, capsys):
    model = from_released(directory).config.model
    (tmp_path / "run.yaml").write_text(
        json.dumps({"model": json.loads(json.dumps(model, default=vars))})
    )
    files = ("--owl2", directory, "--config", tmp_path / "run.yaml", "--output", tmp_path / "ckpt")
    more = ("model.decoder.vocab_multiple=100",)
    assert run_tool("convert_from_hf", *files, *more, capsys=capsys)[0] == 0
    assert from_checkpoint(tmp_path / "ckpt").tensors[PADDED[0]].shape == (400, 64)
    arguments = ("--checkpoint", tmp_path / "ckpt", "--output", tmp_path / "out")
    assert run_tool("convert_to_hf", *arguments, capsys=capsys)[0] == 0
    assert tensors_of(tmp_path / "out")["lm_head.weight"].shape == (ADDED, 64)


def test_a_llama_with_added_pieces_goes_there_and_back(tmp_path):
    llama = cut(LLAMA, tmp_path / "llama", 61)
    config = parts_config()
    config.model.decoder.vocab_size = 61
    whole = from_llama_and_clip(llama, CLIP, config=config)
    assert whole.tensors[PADDED[1]].shape[0] == 64
    export_hf(whole.tensors, whole.config.model, tmp_path / "out", layout="llama")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(llama))


def test_one_rank_computes_what_transformers_does(checkpoint, directory):
    checks = list(compare(checkpoint, directory))
    assert all(check.passed for check in checks) and len(checks) == 12


def test_two_ranks_compute_what_transformers_does(on_two_ranks):
    results = json.loads((on_two_ranks / "results.json").read_text())
    for name in ("TP 2", "PP 2"):
        assert len(results[name]) == 12
        assert [line for line in results[name] if not line.startswith("ok")] == []


def test_two_ranks_answer_what_one_does(on_two_ranks, checkpoint, directory):
    results = json.loads((on_two_ranks / "results.json").read_text())
    for source in (checkpoint, directory):
        generator = Generator(load_model(source))
        alone, together = padded_vocabulary.answers(generator), results[source.name]
        assert together.pop("likelihood") == pytest.approx(alone.pop("likelihood"), abs=1e-3)
        assert together == alone
        assert max(map(max, alone["sampled"])) < ADDED


@pytest.mark.parametrize("name", ["TP 2", "PP 2"])
def test_a_checkpoint_of_two_ranks_is_the_same(on_two_ranks, checkpoint, name):
    before, after = (from_checkpoint(path).tensors for path in (checkpoint, on_two_ranks / name))
    assert_same({n: t.read() for n, t in after.items()}, {n: t.read() for n, t in before.items()})


def test_padding_gets_no_gradient(checkpoint):
    verification = Verification(checkpoint, ["train.precision=fp32"])
    ids = torch.tensor([[1, 5, 322, 7, 9]])
    found = verification.run({"input_ids": ids, "labels": ids}, gradients=True)
    assert found["logits"].shape == (1, 5, ADDED) and found["logits"].isfinite().all()
    assert found["grad.lm_head.weight"].shape == (ADDED, 64)
    for name, parameter in verification.model.named_parameters():
        if name in PADDED:
            assert parameter.main_grad.shape == (328, 64)
            assert not parameter.main_grad[ADDED:].any() and parameter.main_grad[:ADDED].any()


def small_model(multiple: int) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(28, 14, 32, 2, 4, 64),
        abstractor=AbstractorConfig(4, 2, 4, 64),
        decoder=DecoderConfig(21, 32, 2, 4, 2, 64, max_positions=96, vocab_multiple=multiple),
    )


def test_a_random_start_is_the_same_whatever_the_multiple():
    models = []
    for multiple in (1, 16):
        torch.manual_seed(3)
        models.append(weights(build(small_model(multiple))))
    plain, padded = models
    for name, weight in plain.items():
        assert torch.equal(padded[name][: len(weight)], weight), name
    assert all(len(padded[n]) == 32 and not padded[n][21:].any() for n in PADDED)


def test_operations_count_the_rows_that_are_computed():
    load = Load(tokens=10, vision_tokens=5, targets=4, pairs=55, images=1)
    plain, padded = (
        sum(training_flops(small_model(multiple), load, {"output_layer.weight"}).values())
        for multiple in (1, 16)
    )
    assert padded - plain == 6 * 11 * 32 * 4  # forward, and both gradients


def test_a_split_that_does_not_fit_names_the_multiple():
    config = RunConfig()
    config.model.decoder.vocab_size = 32003
    for ranks in (1, 2, 4, 8):
        config.parallel.tensor = ranks
        config.train.global_batch_size = config.train.micro_batch_size
        validate_parallel(config, ranks)
    config.parallel.tensor = 16
    with pytest.raises(
        ConfigError, match=r"\(32003\), with padding 32008, is not .*vocab_multiple \(8\) to 16"
    ):
        validate_parallel(config, 16)
    config.model.decoder.vocab_multiple = 16
    validate_parallel(config, 16)
