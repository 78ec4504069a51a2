"""Checkpoints written and read by a single process, with a tensor or two in memory.

The files are megatron-core's distributed format, as `training.checkpoint` writes and reads it
with all ranks of a run.
"""

import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from tqdm import tqdm

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.convert.lazy_tensor import LazyTensor, finite, read_ahead
from megatron_owl2.training.checkpoint import directories
from megatron_owl2.training.checkpoint.async_writer import raise_io_error
from megatron_owl2.training.checkpoint.index import read_index, stored_weights, unreadable
from megatron_owl2.utils.files import new_directory


class _ReadingPlanner(DefaultSavePlanner):
    """Save planner that reads each tensor when its turn to be written comes."""

    def __init__(self, tensors: dict[str, LazyTensor], progress: tqdm):
        super().__init__()
        self._coming, self._progress = read_ahead(tensors), progress

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        name, tensor = next(self._coming)
        assert name == index.fqn, f"{index.fqn} is asked for before {name}"
        self._progress.update()
        return finite(name, tensor, tensor.dtype)


class _IndexedReader(FileSystemReader):
    """Reader of tensors with an index that was read and checked before."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.index = read_index(directory)

    def read_metadata(self, *args, **kwargs):
        return self.index


def write_checkpoint(
    directory: str | Path,
    tensors: dict[str, LazyTensor],
    config: RunConfig,
    *,
    progress: bool = False,
) -> None:
    """A checkpoint of whole weights at `directory`, which loads under any parallel sizes.

    Every tensor keeps its dtype and has a file of its own. The directory appears when complete.
    Raises CheckpointError if it exists, a weight is not finite or the disk refuses; nothing is left
    then.
    """
    directory = Path(directory)
    empty = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()}
    needed = sum(t.nbytes for t in tensors.values())
    bar = tqdm(total=len(tensors), desc="writing", unit="tensor", disable=not progress)
    with (
        raise_io_error(directory),
        new_directory(directory, needed) as partial,
        bar,
        _single_process(),
    ):
        writer = FileSystemWriter(partial, single_file_per_rank=False, sync_files=False)
        planner = _ReadingPlanner(tensors, bar)
        save(empty, storage_writer=writer, planner=planner, no_dist=True)
        save_config(CheckpointingConfig("torch_dist"), str(partial))
        torch.save({}, partial / "common.pt")  # what megatron-core does not shard: nothing
        directories.write_companions(partial, config, {})


@contextmanager
def _single_process():
    """Single-process use of torch's distributed checkpoints, without its warning of that and
    without check sums, which take longer than the rest and are not looked at when it reads."""
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    finally:
        torch.serialization.set_crc32_options(checked)


def read_checkpoint(directory: str | Path) -> dict[str, LazyTensor]:
    """The whole weights of a checkpoint, saved under any parallel sizes, in its own dtypes.

    Raises CheckpointError for a checkpoint that is not whole, at once or when a tensor is read.
    """
    reader = _IndexedReader(directories.resolve(directory))

    def lazy(name: str, shape: torch.Size, dtype: torch.dtype) -> LazyTensor:
        def read() -> torch.Tensor:
            state = {name: torch.empty(shape, dtype=dtype)}
            try:
                with _single_process():
                    load(state, storage_reader=reader, no_dist=True)
            except (CheckpointException, OSError, RuntimeError) as error:
                raise unreadable(f"{reader.path}: {name}", error) from None
            return state[name]

        return LazyTensor(tuple(shape), dtype, read)

    found = stored_weights(reader.index)
    return {name: lazy(name, entry.size, entry.properties.dtype) for name, entry in found.items()}
