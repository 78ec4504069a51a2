"""A tiny corpus, model and configuration, and real training runs of them through torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tiny_data
import yaml

from megatron_owl2.data.tokenizer import train_tokenizer

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
    """Write shards (pictures with captions, with dialogues, and text), tokenizer and run.yaml.

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


def command(config: Path, output: Path, overrides: Sequence[str], processes: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(processes), "-m", "megatron_owl2.train"]
    return [*launcher, "--config", str(config), f"train.output={output}", *overrides]


def single_threaded(more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a job whose ranks share two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}


def train(
    config: Path,
    output: Path,
    *overrides: str,
    processes: int = 1,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run a stage to its end; does not raise on failure."""
    return subprocess.run(
        command(config, output, overrides, processes),
        capture_output=True,
        text=True,
        timeout=300,
        env=single_threaded(environment),
    )


def interrupt(
    config: Path, output: Path, *overrides: str, processes: int = 1, at_step: int
) -> subprocess.CompletedProcess:
    """Start a stage and press Ctrl-C (SIGINT to the whole group) once `at_step` is logged."""
    run = subprocess.Popen(
        command(config, output, overrides, processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=single_threaded(),
    )
    deadline = time.monotonic() + 200
    while run.poll() is None and len(rows(output)) < at_step and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    out, _ = run.communicate(timeout=100)
    return subprocess.CompletedProcess(run.args, run.returncode, out)


def rows(output: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl."""
    path = Path(output) / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def figures(output: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(output)]
