"""The tensors of a checkpoint directory, whole, read by torch without any process group."""

from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

from megatron_owl2.training.checkpoint.index import read_index

MOMENT = "optimizer.state.exp_avg."


def read(directory: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Everything whose name begins with `prefix`, by the rest of the name."""
    stored = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in read_index(directory).state_dict_metadata.items()
        if name.startswith(prefix) and hasattr(entry, "chunks")
    }
    dcp.load(stored, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
