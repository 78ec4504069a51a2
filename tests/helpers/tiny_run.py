"""A tiny corpus, model and configuration, and real training runs of them through torchrun."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tiny_data
import yaml
from paths import HELPERS
from processes import killed_by_errors, run_ranks, single_threaded, torchrun, wait_until

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.data.batch import Batch
from megatron_owl2.data.loader import BatchLoader, build_loader
from megatron_owl2.data.row_length import row_alignment
from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.data.sampling import phases
from megatron_owl2.data.shards.dataset import open_sources
from megatron_owl2.data.tokenizer import Tokenizer, train_tokenizer
from megatron_owl2.data.training_order import TrainingOrder
from megatron_owl2.training.checkpoint import directories

MODEL = {
    "vision": {
        "image_size": 28,
        "patch_size": 14,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_size": 64,
        "position_init_std": 0.5,
    },
    "abstractor": {
        "num_queries": 4,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_size": 48,
        "attention_init_std": 0.15,
    },
    "decoder": {
        "vocab_size": 320,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 64,
        "max_positions": 64,
    },
    "init_std": 0.1,
}


def make(folder: Path, steps: int = 2) -> Path:
    """Write shards (images with captions, with dialogues, and text), tokenizer and run.yaml.

    One optimizer step is 8 samples in 4 micro-batches. Returns the path of run.yaml.
    """
    tiny_data.write(folder / "shards", map(tiny_data.record, range(60)))
    words = [f"USER: say {i} ASSISTANT: it is picture number {i} sure? yes" for i in range(60)]
    train_tokenizer(words, folder / "tokenizer.model", MODEL["decoder"]["vocab_size"])
    config = {
        "model": MODEL,
        "data": {
            "sources": [{"path": str(folder / "shards"), "weight": 1.0}],
            "tokenizer": str(folder / "tokenizer.model"),
            "sequence_length": 48,
            "workers": 0,
        },
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 0, "vision_layer_decay": 0.9},
        "train": {
            "steps": steps,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "log_interval": 1,
            "save_interval": 1000,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def program(
    config: Path, output: Path, overrides: Sequence[str], fault: Callable | None = None
) -> list[str]:
    """The program of a rank of torchrun; `fault` is one of faults.py."""
    options = ["--config", str(config), f"train.output={output}", *overrides]
    if fault is not None:
        return [str(HELPERS / "faults.py"), fault.__name__, *options]
    return ["-m", "megatron_owl2.train", *options]


def train(
    config: Path,
    output: Path,
    *overrides: str,
    processes: int = 1,
    environment: dict[str, str] | None = None,
    fault: Callable | None = None,
) -> subprocess.CompletedProcess:
    """Run a stage to its end; does not raise on failure."""
    command = program(config, output, overrides, fault)
    return run_ranks(processes, *command, environment=environment)


def interrupt(
    config: Path, output: Path, *overrides: str, processes: int = 1, at_step: int
) -> subprocess.CompletedProcess:
    """Start a stage and press Ctrl-C (SIGINT to the whole group) once `at_step` is logged."""
    run = subprocess.Popen(
        torchrun(processes, *program(config, output, overrides)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=single_threaded(),
    )
    with killed_by_errors(run):
        wait_until(lambda: run.poll() is not None or len(rows(output)) >= at_step, 200)
        os.killpg(run.pid, signal.SIGINT)
        out, _ = run.communicate(timeout=100)
    return subprocess.CompletedProcess(run.args, run.returncode, out)


def loader(config: RunConfig, micro_batch_size: int, **options) -> BatchLoader:
    """Of a data-parallel rank, the only one by default; `options` are build_loader's."""
    datasets = open_sources(config.data)
    one = {"start_sample": 0, "data_parallel_rank": 0, "data_parallel_size": 1}
    one["row_alignment"] = row_alignment(config)
    return build_loader(
        config.data,
        datasets,
        TrainingOrder(config.data, datasets, phases.first_phase(config.data, datasets)),
        SampleBuilder.of(config, Tokenizer(config.data.tokenizer)),
        micro_batch_size=micro_batch_size,
        **(one | options),
    )


def batches(config: RunConfig, micro_batch_size: int, **options) -> Iterator[Batch]:
    """What a data-parallel rank reads; see `loader`."""
    return iter(loader(config, micro_batch_size, **options))


def rows(output: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl."""
    path = Path(output) / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def set_back(output: Path, step: int) -> None:
    """Have a run go on from its checkpoint of `step`, whatever came after it."""
    (output / "checkpoints" / directories.LATEST).write_text(f"iter_{step:07d}")


def figures(output: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(output)]
