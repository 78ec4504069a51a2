"""Directory of a checkpoint: finding the newest whole one, and the files beside its tensors."""

import json
import shutil
import socket
import time
from pathlib import Path

import torch

from megatron_owl2.config.load import load_config, save_config
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.config.validate_model import validate_model
from megatron_owl2.errors import CheckpointError, CheckpointIOError
from megatron_owl2.training.checkpoint.async_writer import raise_on_all_ranks
from megatron_owl2.utils.json_text import parse_json

LATEST = "latest"
_SEEN_WITHIN = 60.0  # seconds in which a node sees what another one has written


def resolve(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the latest of a run or `checkpoints` directory.

    Raises CheckpointError if there is none or it is not whole.
    """
    path, named_by = Path(path), ""
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            path = folder / (folder / LATEST).read_text().strip()
            named_by = f", which {folder / LATEST} names; write the name of another one there"
            break
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist{named_by}")
    if missing := _lacks(path):
        raise CheckpointError(f"{path} is not a complete checkpoint: {', '.join(missing)} missing")
    return path


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run directory, or None for a run that has saved none.

    All ranks together: rank 0 looks, and the others wait until they see it too, as nodes do later
    on network disks. Raises CheckpointIOError if one does not.
    """
    shared = [None]
    with raise_on_all_ranks(run):
        if torch.distributed.get_rank() == 0 and (Path(run) / "checkpoints" / LATEST).is_file():
            shared = [resolve(run)]
    torch.distributed.broadcast_object_list(shared)
    (found,) = shared
    with raise_on_all_ranks(run):
        deadline = time.monotonic() + _SEEN_WITHIN
        while found is not None and _lacks(found):
            if time.monotonic() > deadline:
                raise CheckpointIOError(
                    f"{found} is there for rank 0, but not on {socket.gethostname()}: "
                    "train.output must lie on a disk that all nodes share"
                )
            time.sleep(0.2)
    return found


def read_config(directory: str | Path) -> RunConfig:
    """The resolved configuration of the run that wrote the checkpoint, with its own tokenizer,
    or "" if it was converted without one. Raises ConfigError for sizes that no model has."""
    directory = resolve(directory)
    config = load_config(directory / "run.yaml")
    validate_model(config.model)
    tokenizer = directory / "tokenizer.model"
    config.data.tokenizer = str(tokenizer) if tokenizer.is_file() else ""
    return config


def read_progress(directory: str | Path) -> dict:
    """The progress that `Save` was given. Raises CheckpointError if it is nothing or damaged."""
    directory = resolve(directory)
    try:
        progress = parse_json((directory / "progress.json").read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{directory / 'progress.json'} is damaged: {error}") from None
    if not isinstance(progress, dict):
        raise CheckpointError(f"{directory / 'progress.json'} is damaged: it holds no object")
    if not progress:
        raise CheckpointError(
            f"{directory} holds weights only, so no run can go on from it; start one with "
            "stage.initial_checkpoint"
        )
    return progress


def write_companions(
    partial: Path, config: RunConfig, progress: dict, tokenizer: bytes | None = None
) -> None:
    """Put what makes a checkpoint self-contained beside its tensors; the tokenizer is that of the
    configuration unless its content is given."""
    save_config(config, partial / "run.yaml")
    if tokenizer is not None:
        (partial / "tokenizer.model").write_bytes(tokenizer)
    elif config.data.tokenizer:  # weights converted from a directory without one have none
        shutil.copyfile(config.data.tokenizer, partial / "tokenizer.model")
    (partial / "progress.json").write_text(json.dumps(progress, indent=1))


def _lacks(directory: Path) -> list[str]:
    needed = (".metadata", "metadata.json", "common.pt", "run.yaml", "progress.json")
    return [name for name in needed if not (directory / name).is_file()]
