"""Checks of the machine: GPUs, libraries, files."""

import importlib.util
import logging
import os
import re
import socket
from pathlib import Path

from megatron_owl2.config.fp8 import FP8_RECIPES
from megatron_owl2.config.require import require
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.errors import ConfigError, MachineError

_logger = logging.getLogger(__name__)


def check_machine(config: RunConfig) -> None:
    """Refuse what this machine cannot do, before anything is built.

    Raises ConfigError, and MachineError for GPUs whose driver does not run.
    """
    _check_gpus_are_seen()
    _check_wandb(config)
    if config.watch.profiler == "nsys":
        _require_gpu("watch.profiler=nsys", "watch.profiler=torch")
    if config.kernels.backend == "transformer_engine":
        _require_gpu("kernels.backend=transformer_engine", "kernels.backend=local")
        _check_transformer_engine(config)
    if config.kernels.elementwise == "fused":
        _require_gpu("kernels.elementwise=fused", "kernels.elementwise=auto")
        require(
            importlib.util.find_spec("triton") is not None,
            "kernels.elementwise=fused needs Triton, which torch for GPUs brings, and it is not "
            "installed; use kernels.elementwise=auto",
        )


def warn_of_slow_settings(config: RunConfig) -> None:
    """Warnings of what works on a GPU, and slowly; in the log of rank 0."""
    import torch

    context, on_gpu = config.parallel.context, torch.cuda.is_available()
    first = os.environ.get("RANK", "0") == "0"
    if context > 1 and config.kernels.backend == "local" and on_gpu and first:
        # All keys under a mask: no flash kernel, and twice the work.
        _logger.warning(
            "parallel.context=%d is slow with kernels.backend=local, where every rank attends to "
            "the keys of all others; use kernels.backend=transformer_engine",
            context,
        )


def _require_gpu(key: str, instead: str) -> None:
    import torch

    require(
        torch.cuda.is_available(),
        f"{key} needs a GPU, and torch sees none here; use {instead}",
    )


def _check_transformer_engine(config: RunConfig) -> None:
    """Transformer Engine, and a GPU that can do bf16 and the FP8 recipe."""
    import torch

    try:  # imported as megatron-core does; pyright does not see the optional package
        from transformer_engine.pytorch.fp8 import (  # pyright: ignore[reportMissingImports]
            FP8GlobalStateManager,
        )
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"kernels.backend=transformer_engine cannot be imported ({error}); pip install "
            "--no-build-isolation megatron-owl2[gpu]"
        ) from None
    major, minor = torch.cuda.get_device_capability()
    require(
        major >= 8,
        "kernels.backend=transformer_engine needs compute capability 8.0 for bf16, this GPU has "
        f"{major}.{minor}; use kernels.backend=local",
    )
    if config.kernels.fp8 != "none":  # it depends on GPU, CUDA and cuBLAS together
        recipe = FP8_RECIPES[config.kernels.fp8]
        able, reason = getattr(FP8GlobalStateManager, recipe.support_check)()
        require(able, f"kernels.fp8={recipe.name} does not run here: {reason}")


def _check_wandb(config: RunConfig) -> None:
    spec = importlib.util.find_spec("wandb") if config.wandb.enabled else None
    require(
        # A folder wandb/ of earlier runs looks like a package, but has no file.
        not config.wandb.enabled or (spec is not None and spec.origin is not None),
        "wandb.enabled needs the package wandb, which is not installed; pip install "
        "'megatron-owl2[wandb]', or use wandb.enabled=false",
    )


def _check_gpus_are_seen() -> None:
    """A run that silently takes the CPU of a machine with GPUs would waste it."""
    allotted = os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and not re.match(r"\d|GPU|MIG", visible)
    if hidden or not (allotted or list(Path("/dev").glob("nvidia[0-9]*"))):
        return
    import torch

    if torch.version.cuda and not torch.cuda.is_available():  # another machine may do
        raise MachineError(
            f"torch {torch.__version__} sees none of the GPUs of {socket.gethostname()}: the "
            "driver does not run or is too old for this build; to train on the CPU set "
            "CUDA_VISIBLE_DEVICES to nothing"
        )
    require(
        torch.cuda.is_available(),
        f"this machine has GPUs, but torch {torch.__version__} sees none: it needs a build for "
        "CUDA; to train on the CPU set CUDA_VISIBLE_DEVICES to nothing",
    )


def check_files(config: RunConfig) -> None:
    """Refuse a run whose files and directories are not there; raises ConfigError."""
    require(config.train.output != "", "train.output is not set; name the run directory")
    _check_output(Path(config.train.output))
    require(config.data.tokenizer != "", "data.tokenizer is not set; name a SentencePiece model")
    require(
        Path(config.data.tokenizer).is_file(),
        f"data.tokenizer: {config.data.tokenizer} does not exist",
    )
    require(len(config.data.sources) > 0, "data.sources is empty; name at least one data set")
    places = {f"data.sources[{i}]": source.path for i, source in enumerate(config.data.sources)}
    places |= {f"validation.sources[{i}]": path for i, path in enumerate(config.validation.sources)}
    for key, path in places.items():
        _check_source(key, path, config.data.storage.cache)
    initial = config.stage.initial_checkpoint
    require(
        initial is None or Path(initial).is_dir(),
        f"stage.initial_checkpoint: {initial} is not a directory",
    )


def _check_output(output: Path) -> None:
    """A directory that can be made or written; a home directory is the shell's to fill in."""
    require(
        output.parts[:1] != ("~",),
        f"train.output: {output} would be in a folder called ~; write $HOME in its place",
    )
    there = next(path for path in (output, *output.absolute().parents) if os.path.exists(path))
    require(
        there.is_dir() and os.access(there, os.W_OK | os.X_OK),
        f"train.output: {output} cannot be made or written, for {there} is "
        f"{'not writable' if there.is_dir() else 'a file'}",
    )


def _check_source(key: str, path: str, cache: str) -> None:
    """A sharded data set that is there, or the cache that its URL needs."""
    if "://" in path:
        require(
            cache != "",
            f"{key} is read over a network; set data.storage.cache to a folder on a local disk of "
            "the nodes",
        )
        return
    require(
        (Path(path) / "manifest.json").is_file(),
        f"{key}: {path or '(empty path)'} holds no manifest.json; make shards with "
        "tools/preprocess_data.py",
    )
