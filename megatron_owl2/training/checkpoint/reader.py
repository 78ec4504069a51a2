"""Reading of a checkpoint by all ranks together, once where several of them need the same.

megatron-core has every rank read the index and all of its tensors, that is the whole model once
for each data-parallel rank, and from 0.18 on the error of one rank leaves the others waiting.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_owl2.training.checkpoint.async_writer import raise_on_all_ranks
from megatron_owl2.training.checkpoint.index import read_index, unreadable
from megatron_owl2.training.from_rank_0 import from_rank_0

# What torch raises, some of it only for a damaged file.
_UNREADABLE = (OSError, RuntimeError, ValueError, AssertionError, EOFError, UnpicklingError)


class CheckpointReader:
    """A checkpoint directory opened by all ranks together.

    Rank 0 reads `index` and `common`, what is not sharded, and sends them to the others. All
    methods are called by all ranks together and raise CheckpointError on all of them if one cannot
    read, CheckpointIOError if that may pass.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.index: Metadata
        self.common: dict
        self.index, self.common = from_rank_0(
            lambda: (read_index(directory), _read_common(directory))
        )

    def read(self, shares: Iterable[ShardedTensor | ShardedTensorFactory]) -> None:
        """Fill the data of this rank's shares, in place; the index has been found to have them."""
        parts = [part for share in shares for part in stored_parts(share)]
        with raise_on_all_ranks(self.directory):
            planner = _Planner(self.index, parts)
            reader = FileSystemReader(self.directory)
            reader.set_up_storage_reader(self.index, is_coordinator=False)
            try:
                reader.read_data(planner.create_local_plan(), planner)
            except _UNREADABLE as error:
                raise unreadable(self.directory, error) from error

    def read_replicated(
        self,
        shares: Iterable[ShardedTensor | ShardedTensorFactory],
        group: torch.distributed.ProcessGroup,
    ) -> None:
        """Fill the data of shares that all ranks of `group` have alike and in the same order: each
        is read by one of them, which sends it to the others."""
        # Large ones first, so that none reads much more than another.
        ordered = sorted(shares, key=lambda share: _data(share).numel(), reverse=True)
        self.read(ordered[group.rank() :: group.size()])
        if group.size() > 1:
            for number, share in enumerate(ordered):
                source = torch.distributed.get_global_rank(group, number % group.size())
                torch.distributed.broadcast(_data(share), source, group)


def stored_parts(share: ShardedTensor | ShardedTensorFactory) -> Sequence[Any]:
    """The ShardedTensors of a share that are stored one by one, whose data are views of its own:
    gate and up, one behind the other; else the share itself."""
    parts: Any = share.build() if isinstance(share, ShardedTensorFactory) else [share]
    return parts


def _data(share: ShardedTensor | ShardedTensorFactory) -> torch.Tensor:
    assert share.data is not None, "shares of a live model have data"
    return share.data.detach()


class _Planner(DefaultLoadPlanner):
    """Plan of what to read of which stored tensors into `parts`, on this rank alone."""

    def __init__(self, index: Metadata, parts: Sequence[ShardedTensor]):
        super().__init__()
        self._index = index
        self._parts = {(part.key, torch.Size(part.global_offset)): part for part in parts}

    def create_local_plan(self) -> LoadPlan:
        items = []
        for (name, offset), part in self._parts.items():
            chunk = ChunkStorageMetadata(offset, torch.Size(part.local_shape))
            stored: Any = self._index.state_dict_metadata[name]
            items += create_read_items_for_chunk_list(name, stored, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None, "a read item has the place that it was planned for"
        return _data(self._parts[index.fqn, index.offset])


def _read_common(directory: Path) -> dict:
    try:
        return dist_checkpointing.load_common_state_dict(str(directory))
    except _UNREADABLE as error:
        raise unreadable(directory, error) from error
