"""Wrong input is refused before work starts, in words that name it and the fix."""

import re

import pytest
import tiny_run
import torch

from megatron_owl2.config.load import load_config, save_config
from megatron_owl2.config.machine import check_machine, warn_of_slow_settings
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.config.validate import validate
from megatron_owl2.config.validate_model import validate_model
from megatron_owl2.config.validate_parallel import validate_parallel
from megatron_owl2.errors import ConfigError

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory):
    """The configuration of a tiny run, with its data."""
    return tiny_run.make(tmp_path_factory.mktemp("tiny"))


def test_the_defaults_are_the_papers_model_and_pass_the_checks():
    config = RunConfig()
    validate_model(config.model)
    validate_parallel(config, world_size=64)
    assert config.model.tokens_per_image == 65
    assert config.model.vision.grid_size == 16


def test_files_extend_others_and_overrides_win(tmp_path):
    (tmp_path / "parent.yaml").write_text("train: {steps: 5, micro_batch_size: 3}\n")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\ntrain: {steps: 6}\n")
    config = load_config(
        tmp_path / "child.yaml", ["optimizer.lr=2e-3", "stage.rates={'vision_model.*': 0.5}"]
    )
    assert (config.train.steps, config.train.micro_batch_size) == (6, 3)
    assert config.optimizer.lr == 2e-3
    assert config.stage.rates == {"vision_model.*": 0.5}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("2024_11_05", "2024_11_05"),
        ("007", "007"),
        ("12:30", "12:30"),
        ("1e3", "1e3"),
        ("no", "no"),
        ("a #b", "a #b"),
        ("a=b", "a=b"),
        ("'a b '", "a b "),
        (" a b ", "a b"),
        ("${data.tokenizer}", "t"),
    ],
)
def test_a_text_on_the_command_line_is_taken_as_it_is(tmp_path, given, wanted):
    (tmp_path / "run.yaml").write_text("data: {tokenizer: t}\n")
    overrides = [f"train.output={given}", f"stage.initial_checkpoint={given}"]
    config = load_config(tmp_path / "run.yaml", overrides)
    assert config.train.output == config.stage.initial_checkpoint == wanted
    for nothing in ("null", " Null", "NULL", "~", ""):
        last = f"stage.initial_checkpoint={nothing}"
        config = load_config(tmp_path / "run.yaml", [*overrides, last])
        assert config.stage.initial_checkpoint is None


def test_a_run_directory_that_cannot_be_is_refused_at_once(run_yaml, tmp_path):
    (tmp_path / "file").touch()
    for place, words in (
        (tmp_path / "file", "file is a file"),
        (tmp_path / "file/run", "run cannot be made or written, for .*/file is a file"),
        ("~/run", "write [$]HOME"),
    ):
        with pytest.raises(ConfigError, match=words):
            validate(load_config(run_yaml, [f"train.output={place}"]), 1)
    for place in (tmp_path / "new/run", ".", "./"):
        validate(load_config(run_yaml, [f"train.output={place}"]), 1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.stps=5", "unknown key 'train.stps'; did you mean 'train.steps'"),
        ("trian.steps=5", "unknown key 'trian'; did you mean 'train'"),
        ("data.sources=[{pth: x}]", r"did you mean 'data.sources\[0\].path'"),
        ("data.sources=[x]", r"data.sources\[0\]' is a section"),
        ("data.sources=x", "'data.sources' is a list"),
        ("train.steps=many", "train.steps"),
        ("model.vision=3", "'model.vision' is a section"),
        ("train.steps", "has no '='"),
        ("data.sources=[{path: x}", "not valid YAML"),
    ],
)
def test_keys_and_values_that_do_not_exist(tmp_path, override, words):
    (tmp_path / "run.yaml").write_text("train: {steps: 5}\n")
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "run.yaml", [override])


def test_steps_beside_epochs_are_not_left_aside():
    path = "examples/7b/finetune.yaml"
    assert load_config(path).train.epochs == 1
    with pytest.raises(
        ConfigError, match=r"train.epochs is 1 and in its place; say train.epochs=0"
    ):
        load_config(path, ["train.steps=10"])
    config = load_config(path, ["train.steps=10", "train.epochs=0"])
    assert (config.train.steps, config.train.epochs) == (10, 0)


def test_a_reference_to_nothing_is_named(run_yaml):
    with pytest.raises(ConfigError, match=r"FOO.*\(key train.output\)"):
        load_config(run_yaml, ["train.output=${FOO}"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("extends: other.yaml\n", "other.yaml does not exist"),
        ("extends: run.yaml\n", "extends itself"),
        ("- 1\n", "must hold sections"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "override, world_size, words",
    [
        ("parallel.tensor=3", 3, r"num_heads \(4\) is not divisible by parallel.tensor \(3\)"),
        ("parallel.tensor=4", 4, r"num_kv_heads \(2\) is not divisible by parallel.tensor"),
        ("parallel.tensor=2", 3, "3 processes cannot be divided by .* start a multiple of 2"),
        ("parallel.pipeline=3", 3, r"num_layers \(4\) is not divisible by parallel.pipeline"),
        ("parallel.pipeline=2 & parallel.layers=[1,2]", 2, "2 numbers, .* that add up to 4"),
        ("parallel.virtual_pipeline=2", 1, "there is no pipeline"),
        (
            "parallel.pipeline=2 & parallel.virtual_pipeline=4",
            2,
            r"layers \(4\) .*= 8; name",
        ),
        (
            "parallel.pipeline=2 & parallel.virtual_pipeline=2 & train.micro_batch_size=8",
            2,
            r"a step has 1 micro-batches .* a multiple of parallel.pipeline \(2\)",
        ),
        ("parallel.context=5", 5, r"length \(48\) is not divisible by 2 x parallel.context \(5\)"),
        ("parallel.recompute=true", 1, "use none, selective or full"),
        ("kernels.backend=apex", 1, "use local or transformer_engine"),
        ("kernels.fp8=e4m3", 1, "use none, tensorwise, delayed, blockwise or mxfp8"),
        ("kernels.fp8=delayed", 1, "needs kernels.backend=transformer_engine; .* be in bf16"),
        ("kernels.backend=transformer_engine", 1, "set train.precision to bf16"),
        ("health.spike_factor=-1", 1, "spike_factor is -1.0; it must be finite and not below 0"),
        ("health.spike_factor=0.5", 1, r"spike_factor \(0.5\) must be above 1"),
        ("health.step_timeout=.inf", 1, "step_timeout is inf; it must be finite"),
        ("watch.peak_tflops=-1", 1, "watch.peak_tflops is -1.0; it must be finite and not below"),
        ("optimizer.lr=.inf", 1, "optimizer.lr is inf; it must be finite"),
        ("optimizer.weight_decay=.nan", 1, "optimizer.weight_decay is nan; it must be finite"),
        ("optimizer.clip_grad=-1", 1, "optimizer.clip_grad is -1.0"),
        ("optimizer.beta2=1", 1, r"beta2 \(1.0\) must be below 1"),
        ("optimizer.eps=0", 1, r"eps \(0.0\) above 0"),
        ("optimizer.vision_layer_decay=1.1", 1, r"vision_layer_decay \(1.1\) must be above 0"),
        ("stage.rates={'*': -1}", 1, r"stage.rates: '\*' has -1.0; a factor must be finite"),
        ("watch.profiler=perf", 1, "use none, torch or nsys"),
        ("watch.profile_step=0", 1, "watch.profile_step is 0; it must be at least 1"),
        ("wandb.mode=disabled", 1, "use offline or online"),
        ("parallel.pipeline=0", 1, "parallel.pipeline is 0; it must be at least 1"),
        ("parallel.sequence=true", 1, "needs parallel.tensor > 1"),
        ("train.micro_batch_size=3", 1, r"global_batch_size \(8\) is not a multiple"),
        ("train.micro_batch_size=0", 1, "micro_batch_size is 0; it must be at least 1"),
        ("data.workers=-1", 1, "data.workers is -1; it must be at least 0"),
        ("train.precision=fp16", 1, "use fp32 or bf16"),
        ("optimizer.warmup_steps=2", 1, "must be smaller than train.steps"),
        ("optimizer.min_lr=1", 1, "min_lr"),
        ("model.vision.image_size=30", 1, "image_size .30. is not divisible by model.vision.patch"),
        ("model.vision.num_heads=5", 1, "num_heads .5. does not divide"),
        (
            "model.tokenization=official_train",
            1,
            "words of model.template owl1, which owl2",
        ),
        (
            "model.template=owl1 & model.tokenization=official_inference",
            1,
            "official_inference asks only, .* train with turns or official_train",
        ),
        ("data.sequence_length=5", 1, "leaves no room for text"),
        ("data.sequence_length=96", 1, "exceeds model.decoder.max_positions"),
        ("data.tokenizer=/no/tokenizer.model", 1, "/no/tokenizer.model does not exist"),
        ("data.sources=[]", 1, "data.sources is empty"),
        ("data.sources=[{path: /no}]", 1, "/no holds no manifest.json; make shards with"),
        ("stage.initial_checkpoint=/no", 1, "initial_checkpoint: /no is not a directory"),
        ("train.output=''", 1, "train.output is not set"),
        ("data.sources=[{path: x, weight: -1}]", 1, r"sources\[0\].weight is -1.0; .* not below 0"),
        ("data.sources=[{path: x}, {path: y, weight: 0}]", 1, "a weight of 0 stands for"),
        ("data.max_bad_fraction=1.5", 1, "max_bad_fraction is 1.5; it must be from 0 to 1"),
        ("data.stall_timeout=0", 1, "data.stall_timeout is 0.0; it must be finite and above 0"),
        ("data.storage.cache_gib=.inf", 1, "data.storage.cache_gib is inf; it must be finite"),
        ("validation.interval=-1", 1, "validation.interval is -1; it must be at least 0"),
        ("validation.interval=5", 1, "interval is 5, but validation.sources is empty; name data"),
        (
            "validation.sources=[/no] & validation.interval=5",
            1,
            r"validation.sources\[0\]: /no holds no manifest.json; make shards with",
        ),
        (
            "validation.sources=['http://x/y'] & validation.interval=5",
            1,
            r"validation.sources\[0\] is read over a network; set data.storage.cache to",
        ),
    ],
)
def test_runs_that_cannot_work(run_yaml, tmp_path, override, world_size, words):
    output = [f"train.output={tmp_path / 'run'}"]
    validate(load_config(run_yaml, output), world_size=1)
    with pytest.raises(ConfigError, match=words):
        validate(load_config(run_yaml, [*output, *override.split(" & ")]), world_size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only without a GPU")
def test_nsys_without_a_gpu(run_yaml):
    config = load_config(run_yaml, ["watch.profiler=nsys"])
    with pytest.raises(ConfigError, match="nsys needs a GPU, .*; use watch.profiler=torch"):
        check_machine(config)


def test_local_context_parallelism_on_a_gpu_is_warned_of(run_yaml, monkeypatch, caplog):
    te, context = "kernels.backend=transformer_engine", "parallel.context=2"
    for overrides, on_gpu in (([], True), ([context], False), ([context, te], True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=on_gpu: seen)
        warn_of_slow_settings(load_config(run_yaml, overrides))
    assert not caplog.records
    warn_of_slow_settings(load_config(run_yaml, [context]))
    assert te in caplog.text


def test_validation_on_data_that_is_there(run_yaml, tmp_path):
    sources = f"validation.sources=['{run_yaml.parent / 'shards'}', 'http://x/y']"
    overrides = ["validation.interval=5", sources, f"data.storage.cache={tmp_path / 'cache'}"]
    validate(load_config(run_yaml, [f"train.output={tmp_path}", *overrides]), world_size=1)


# Sizes that FP8 GEMMs take, and a parallelism that gathers their rows.
WIDE = [
    "model.decoder.hidden_size=64",
    "model.decoder.num_kv_heads=4",
    "data.sequence_length=64",
    "model.decoder.max_positions=64",
]
SP = ["parallel.tensor=2", "parallel.sequence=true"]
OVERLAP = [*WIDE, *SP, "parallel.tensor_overlap=true"]


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([], "needs a GPU|cannot be imported"),
        (
            ["kernels.fp8=delayed"],
            r"num_kv_heads x head size .* is 8; .* of 16",
        ),
        (["kernels.fp8=mxfp8", "data.sequence_length=40"], "= 80 rows .* multiple of 32 on each"),
        (["model.decoder.num_heads=8"], "heads are 4 wide; .* multiples of 8 up to 256"),
        (
            ["kernels.fp8=blockwise", *WIDE, *SP],
            "= 128 rows over 2 ranks; kernels.fp8=blockwise with parallel.sequence .* of 128 on",
        ),
        (
            ["kernels.fp8=blockwise", *WIDE, *SP, "train.micro_batch_size=8"],
            "hidden_size is 64; kernels.fp8=blockwise with parallel.sequence .* of 128",
        ),
        (["kernels.fp8=blockwise", *WIDE], "needs a GPU|cannot be imported|does not run here"),
        (["parallel.tensor_overlap=true"], "set parallel.sequence=true, or parallel.tensor_over"),
        (
            ["parallel.tensor_overlap=true", "parallel.tensor=2", "model.decoder.num_kv_heads=2"],
            "set parallel.sequence=true, or parallel.tensor_over",
        ),
        ([*OVERLAP, "kernels.backend=local"], "needs the GEMMs of kernels.backend=transformer_eng"),
        (
            [*OVERLAP, "kernels.fp8=blockwise"],
            "do not take kernels.fp8=blockwise; set parallel.tensor_overlap=false",
        ),
        (
            [*OVERLAP, "kernels.fp8=mxfp8", "train.micro_batch_size=2"],
            "= 128 rows over 2 ranks; kernels.fp8=mxfp8 with parallel.sequence .* of 128 on each",
        ),
        (OVERLAP, "needs a GPU|cannot be imported"),
    ],
)
def test_kernels_that_are_not_there_or_do_not_fit(run_yaml, tmp_path, overrides, words):
    backend = ["kernels.backend=transformer_engine", "train.precision=bf16"]
    narrow = "model.decoder.num_kv_heads=1"
    output = f"train.output={tmp_path / 'run'}"
    config = load_config(run_yaml, [output, *backend, narrow, *overrides])
    with pytest.raises(ConfigError, match=words):
        validate(config, world_size=config.parallel.tensor)


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.stps=5", "did you mean 'train.steps'"),
        ("stage.trainable=['vision_modle.*']", "'vision_modle.*' matches no parameter"),
        ("stage.rates={'abstracter.*': 2}", "'abstracter.*' matches no parameter"),
        ("stage.trainable=[]", "nothing would train"),
        ("data.tokenizer={shards}/manifest.json", "not a SentencePiece model"),
        ("model.decoder.vocab_size=318", "has 320 pieces"),
    ],
)
def test_the_trainer_ends_with_one_line_and_a_status(tmp_path, override, words):
    config = tiny_run.make(tmp_path)
    override = override.replace("{shards}", str(tmp_path / "shards"))
    refused = tiny_run.train(config, tmp_path / "run", override)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr.split("error: ")[0]
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert tiny_run.rows(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train:\n  steps: 1\ntrain:\n  steps: 2\n", "the key 'train' stands there twice"),
        ("train:\n  steps: 1\n  steps: 2\n", "the key 'steps' stands there twice"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: 2020-99-99", "is not valid YAML"),
        ("# nothing\n", "is empty"),
        ("stage: {rates: [1]}", "'stage.rates' is a section, not"),
    ],
)
def test_files_that_say_no_one_thing_are_refused(tmp_path, text, reason):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(reason)) as error:
        load_config(path)
    assert str(path) in str(error.value)
