"""An installed wheel in an empty folder: the command, the examples, a run and the public API."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_data
import tiny_run
from paths import ROOT

from megatron_owl2.cli.main import VERBS

pytestmark = pytest.mark.slow

# What a wheel is built from. README.md is its long description.
SOURCES = ("megatron_owl2", "data_prep", "examples")
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


class Installed:
    """An environment that has the wheel, and the third-party packages of this interpreter."""

    def __init__(self, folder: Path, work: Path):
        self.bin, self.work = folder / "bin", work
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self.environment = kept | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, *command: object) -> subprocess.CompletedProcess:
        """A command in the empty folder."""
        words = list(map(str, command))
        words[0] = shutil.which(words[0], path=self.environment["PATH"]) or words[0]
        return subprocess.run(
            words, cwd=self.work, env=self.environment, capture_output=True, text=True, timeout=400
        )

    def succeed(self, *command: object) -> str:
        """What a command prints that must end with 0."""
        done = self.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    wheel = ["wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    pip(*wheel, "--wheel-dir", folder, tree)
    shutil.rmtree(tree)

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    place = f"python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    # A folder that a .pth file names is searched, but its own .pth files are not read: so this
    # project's editable installation stays out.
    third_party = [path for path in sys.path if path.endswith("site-packages")]
    (folder / "env/lib" / place / "third_party.pth").write_text("\n".join(third_party) + "\n")
    install = ["install", "--no-index", "--no-deps", "--ignore-installed"]
    pip("--python", folder / "env/bin/python", *install, *folder.glob("*.whl"))
    (folder / "work").mkdir()
    return Installed(folder / "env", folder / "work")


@pytest.fixture(scope="module")
def trained(installed) -> Path:
    """A run of two steps, the second by two ranks of torchrun."""
    config = tiny_run.make(installed.work)
    run = ["owl2", "train", "--config", config, "train.output=run"]
    installed.succeed(*run, "train.steps=1")
    launcher = ["torchrun", "--standalone", "--nproc-per-node", 2, "--no-python"]
    launcher[:1] = ["python", "-m", "torch.distributed.run"]
    said = installed.succeed(*launcher, *run)
    assert "continuing from" in said
    assert [row["step"] for row in tiny_run.rows(installed.work / "run")] == [1, 2]
    return installed.work / "run"


def test_the_command_is_there_and_nothing_is_from_the_checkout(installed):
    said = installed.succeed("owl2", "--help")
    assert all(f"  {verb} " in said for verb in VERBS)
    code = "import data_prep, megatron_owl2 as m; print(m.__file__, data_prep.__file__)"
    for path in installed.succeed("python", "-c", code).split():
        assert path.startswith(str(installed.bin.parent))
    package = "lib/*/site-packages/megatron_owl2"
    assert list(installed.bin.parent.glob(f"{package}/evaluation/templates/mistakes.html"))
    page = [path.name for path in (ROOT / "megatron_owl2/serving/page").iterdir()]
    shipped = installed.bin.parent.glob(f"{package}/serving/page/*")
    assert sorted(path.name for path in shipped) == sorted(page)
    code = ROOT / "megatron_owl2/convert/remote_code"
    for layout in ("owl1", "owl2"):  # with what links lead to
        shipped = installed.bin.parent.glob(f"{package}/convert/remote_code/{layout}/*.py")
        texts = {path.name: path.read_text() for path in shipped}
        assert texts == {path.name: path.read_text() for path in (code / layout).glob("*.py")}
    wrong = installed.run("owl2", "plam")
    assert wrong.returncode == 2 and "did you mean 'plan'?" in wrong.stderr


def test_examples_come_along(installed):
    names = [str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*.yaml")]
    for recipe in ("mixture", "instructions", "owl1_instructions"):  # of data_prep
        names.remove(f"examples/{recipe}.yaml")
    assert len(names) > 10
    code = f"import megatron_owl2\nfor name in {names}: megatron_owl2.load_config(name)"
    installed.succeed("python", "-c", code)
    options = ["--config", "examples/tiny/pretrain.yaml", "--gpus", 2, "--gpu-memory", 80]
    assert "this configuration fits" in installed.succeed("owl2", "plan", *options)
    said = installed.succeed(
        "owl2", "build-mixture", "--recipe", "examples/mixture.yaml", "--folder", "mixture"
    )
    assert "next: " in said or "bring " in said


def test_a_run_answers_and_is_exported(installed, trained):
    tiny_data.make_image(3).save(installed.work / "owl.png")
    question = ["--image", "owl.png", "--prompt", "what number?", "--max-new-tokens", 5]
    said = installed.succeed("owl2", "generate", "--checkpoint", "run", *question)
    assert said.endswith("\n")
    installed.succeed("owl2", "convert-to-hf", "--checkpoint", "run", "--output", "model")
    folder = ROOT / "megatron_owl2/convert/remote_code/owl2"
    code = {path.name for path in folder.glob("*_owl2.py")}
    assert len(code) >= 7
    assert code <= {path.name for path in (installed.work / "model").iterdir()}
    assert installed.succeed("owl2", "generate", "--checkpoint", "model", *question) == said
    # The README's lines.
    api = """
import megatron_owl2 as owl2
model = owl2.load("model")
answer = model.generate("what number?", images=["owl.png"], max_new_tokens=5)
record = owl2.ShardedDataset("shards")[37]
config = owl2.load_config("examples/7b/pretrain.yaml", ["train.steps=10"])
print(repr((answer, record.key, config.train.steps)))
"""
    assert installed.succeed("python", "-c", api) == f"{(said[:-1], 'tiny00037', 10)!r}\n"


def test_a_program_trains(installed, trained):
    program = installed.work / "program.py"
    program.write_text(
        """
import megatron_owl2 as owl2
config = owl2.load_config("run.yaml", ["train.output=api", "train.steps=2"])
assert owl2.Trainer(config).train() == 0
config.train.precision = "fp16"
try:
    owl2.Trainer(config).train()
except owl2.Owl2Error as error:
    print(error)
"""
    )
    assert "use fp32 or bf16" in installed.succeed("python", program)
    assert [row["step"] for row in tiny_run.rows(installed.work / "api")] == [1, 2]


def test_data_is_prepared(installed):
    (installed.work / "documents.jsonl").write_text('{"text": "an owl at night"}\n' * 3)
    options = ["--input", "documents.jsonl", "--format", "documents", "--output", "set"]
    installed.succeed("owl2", "preprocess-data", *options)
    assert (installed.work / "set/report.html").stat().st_size > 1000
    assert "3 good" in installed.succeed("owl2", "check-data", "set")
