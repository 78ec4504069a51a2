"""Packaging: declared requirements and extras, examples as package data."""

import ast
import configparser
import importlib.util
import sys
from importlib.machinery import ModuleSpec

import pytest
import tiny_run
from paths import EXAMPLES, ROOT

from megatron_owl2.config.examples import locate
from megatron_owl2.config.load import load_config
from megatron_owl2.config.machine import check_machine
from megatron_owl2.errors import ConfigError

# Modules whose distribution has another name.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "PyYAML", "megatron": "megatron-core"}
# Imported where they are used, with an error that names the extra.
OPTIONAL = {
    "aiohttp": "remote",  # of fsspec[http]
    "av": "video",
    "h11": "serve",
    "httpx": "judge",
    "lm_eval": "lm-eval",
    "lmms_eval": "lmms-eval",
    "matplotlib": "report",
    "prometheus_client": "serve",
    "pyarrow": "parquet",
    "pycocoevalcap": "captions",
    "pydantic": "serve",
    "pydantic_core": "serve",  # of pydantic
    "starlette": "serve",
    "transformers": "hf",
    "transformer_engine": "gpu",
    "triton": "gpu",  # torch for GPUs brings it
    "uvicorn": "serve",
    "vllm": "vllm",
    "wandb": "wandb",
}


def imported(folder: str) -> set[str]:
    """Top-level names that the modules of a folder import, without the standard library's."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def requirements(text: str) -> set[str]:
    """Names of distributions without versions and extras."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith("#")]
    return {line.partition("[")[0].split("=")[0].rstrip("<>~") for line in lines if line}


def test_what_is_imported_is_declared_and_no_more():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    names = (imported("megatron_owl2") | imported("data_prep")) - {"megatron_owl2", "data_prep"}
    assert OPTIONAL.keys() <= names
    needed = {DISTRIBUTIONS.get(name, name) for name in names - OPTIONAL.keys()}
    assert requirements(setup["options"]["install_requires"]) == needed
    assert set(OPTIONAL.values()) <= set(setup["options.extras_require"])


def test_a_missing_wandb_is_refused_with_the_fix(tmp_path, monkeypatch):
    config = load_config(tiny_run.make(tmp_path), ["wandb.enabled=true"])
    check_machine(config)
    folder = ModuleSpec("wandb", None)  # what a folder wandb/ of earlier runs looks like
    for spec in (None, folder):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(ConfigError, match=r"pip install 'megatron-owl2\[wandb\]'"):
            check_machine(config)
    config.wandb.enabled = False
    check_machine(config)


def test_examples_are_found_from_anywhere(tmp_path, monkeypatch):
    """In a folder without them, also for what extends them and through `extends` of their own."""
    monkeypatch.chdir(tmp_path)
    assert load_config("examples/7b/ablations/queries_8.yaml") == load_config(
        EXAMPLES / "7b/ablations/queries_8.yaml"
    )
    (tmp_path / "mine").mkdir()
    mine = tmp_path / "mine/run.yaml"
    mine.write_text("extends: examples/tiny/pretrain.yaml\ntrain: {steps: 3}\n")
    assert load_config("mine/run.yaml").train.steps == load_config(mine).train.steps == 3
    assert load_config(mine).model == load_config("examples/tiny/model.yaml").model
    assert load_config(mine, ["examples/tiny/finetune.yaml"]).stage.name == "finetune"


def test_files_of_the_user_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("examples/mixture.yaml").samefile(EXAMPLES / "mixture.yaml")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/mixture.yaml").touch()
    for path in ("examples/mixture.yaml", "examples/no.yaml", "tiny/model.yaml", ""):
        assert (tmp_path / locate(path)) == tmp_path / path
    with pytest.raises(ConfigError, match="config file examples/tiny/no.yaml does not exist"):
        load_config("examples/tiny/no.yaml")
