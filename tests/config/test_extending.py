"""A choice is added to a configuration key in the one or two files named here, nowhere else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def tree(tmp_path):
    """A copy of the package that may be changed."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_owl2", tmp_path / "megatron_owl2", ignore=ignore)
    (tmp_path / "run.yaml").write_text("{}\n")
    return tmp_path


def change(file: Path, old: str, new: str) -> None:
    """Replace what must be there exactly once."""
    text = file.read_text()
    assert text.count(old) == 1, f"{file} no longer has {old!r} once"
    file.write_text(text.replace(old, new))


def run(tree: Path, program: str) -> str:
    """What a program prints with the changed package."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


VALIDATE = """
import sys
from megatron_owl2.config.load import load_config
from megatron_owl2.config.validate import validate_settings
from megatron_owl2.errors import ConfigError

def check(*overrides):
    try:
        validate_settings(load_config("run.yaml", overrides), world_size=8)
        print("accepted")
    except ConfigError as error:
        print(error)
"""


def test_an_fp8_recipe_is_a_name_and_a_row_in_one_file(tree):
    file = tree / "megatron_owl2/config/fp8.py"
    change(file, '"mxfp8"]', '"mxfp8", "tiles"]')
    row = '        FP8Recipe("tiles", "e4m3", 64, 512, "is_fp8_available"),\n'
    change(file, "    )\n}\n", f"{row}    )\n}}\n")
    te = '"kernels.backend=transformer_engine", "kernels.fp8=tiles"'
    program = f"""{VALIDATE}
check({te})
check({te}, "train.micro_batch_size=1", "train.global_batch_size=64", "data.sequence_length=96")
check({te}, "parallel.tensor=2", "parallel.sequence=true", "train.micro_batch_size=2")
check("kernels.fp8=tiles")
check("kernels.fp8=tile")
print("torch" in sys.modules)
"""
    assert run(tree, program).splitlines() == [
        "accepted",
        "data.sequence_length x train.micro_batch_size = 96 rows over 1 ranks; kernels.fp8=tiles "
        "needs a multiple of 64 on each",
        "data.sequence_length x train.micro_batch_size = 512 rows over 2 ranks; kernels.fp8=tiles "
        "with parallel.sequence needs a multiple of 512 on each",
        "kernels.fp8=tiles needs kernels.backend=transformer_engine; with the local one the run "
        "would be in bf16",
        "the command line: kernels.fp8 is 'tile'; use none, tensorwise, delayed, blockwise, mxfp8 "
        "or tiles",
        "False",
    ]


def test_a_kernel_backend_is_a_name_and_a_case_in_two_files(tree):
    change(
        tree / "megatron_owl2/config/schema.py",
        'Literal["local", "transformer_engine"]',
        'Literal["local", "transformer_engine", "triton"]',
    )
    change(
        tree / "megatron_owl2/model/kernels/__init__.py",
        '    if context.backend == "transformer_engine":\n',
        '    if context.backend == "triton":\n        return "the kernels of triton"\n'
        '    if context.backend == "transformer_engine":\n',
    )
    program = f"""{VALIDATE}
check("kernels.backend=triton")
check("kernels.backend=apex")
from types import SimpleNamespace
from megatron_owl2.model.kernels import build_kernels
print(build_kernels(SimpleNamespace(backend="triton")))
"""
    assert run(tree, program).splitlines() == [
        "accepted",
        "the command line: kernels.backend is 'apex'; use local, transformer_engine or triton",
        "the kernels of triton",
    ]


def test_another_choice_and_another_range_are_one_line_of_the_schema(tree):
    file = tree / "megatron_owl2/config/schema.py"
    change(file, 'Literal["offline", "online"]', 'Literal["offline", "online", "shared"]')
    change(
        file,
        "    max_skipped: int =",
        "    patience: int = number(3, at_least=2, at_most=9)\n    max_skipped: int =",
    )
    program = f"""{VALIDATE}
check("wandb.mode=shared", "health.patience=9")
check("wandb.mode=off-line")
check("health.patience=1")
"""
    assert run(tree, program).splitlines() == [
        "accepted",
        "the command line: wandb.mode is 'off-line'; use offline, online or shared",
        "health.patience is 1; it must be whole and from 2 to 9",
    ]
