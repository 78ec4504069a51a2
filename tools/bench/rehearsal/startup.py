"""Readings of a start by every rank for itself, by one of each node, or once for all ranks."""

import pickle
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.storage.local import LocalStorage
from megatron_owl2.training.checkpoint.index import read_index
from rehearsal.cluster import Cluster
from rehearsal.store import StoreModel

_OPTIMIZER_TENSORS = 3  # of a parameter: itself in fp32, and two moments
_BLOCKS = 3  # at most, of a rank's part of a parameter


@dataclass(frozen=True)
class Reading:
    """Something that all ranks need: bytes from the file system in all, and for the busiest node,
    requests, bytes sent on between nodes for each of them, and seconds of a rank to unpack it."""

    what: str
    readers: str
    bytes: float
    node_bytes: float
    requests: int
    sent_on: float = 0.0
    processor_seconds: float = 0.0

    def seconds(self, model: StoreModel, interconnect: float) -> float:
        """Until the last rank has it, with nothing else under way."""
        reading = max(self.bytes / model.bandwidth, self.node_bytes / model.node_bandwidth)
        return model.latency + reading + self.sent_on / interconnect + self.processor_seconds


def readings(
    cluster: Cluster, folder: str, weights: float, trained: float, tensors: int
) -> list[Reading]:
    """The readings of a start and of a resumption; `weights` and `trained` are bytes of bf16."""
    nodes, ranks, on_node = cluster.nodes, cluster.ranks, cluster.ranks_per_node
    found = []

    def add(what: str, size: float, requests: int, seconds: float = 0.0) -> None:
        options = (
            ("every rank", ranks, on_node, 0.0),
            ("one rank of each node", nodes, 1, 0.0),
            ("one rank, then a broadcast", 1, 1, size),
        )
        for readers, count, of_node, sent_on in options:
            amounts = count * size, of_node * size, count * requests
            found.append(Reading(what, readers, *amounts, sent_on, seconds))

    add("manifest", *_open_source(folder))
    add("checkpoint index", *_open_index(ranks, tensors))
    add("weights", weights, tensors)
    share = weights / nodes
    readers = "each tensor by one rank, then a broadcast"
    found[-1] = Reading("weights", readers, weights, share, tensors, weights)
    state = trained * 2 * _OPTIMIZER_TENSORS  # fp32
    blocks = _OPTIMIZER_TENSORS * _BLOCKS * ranks
    found.append(Reading("optimizer state", "its rank", state, state / nodes, blocks))
    return found


class _CountingStorage(LocalStorage):
    bytes = 0

    def read_file(self, name: str) -> bytes:
        data = super().read_file(name)
        self.bytes += len(data)
        return data


def _open_source(folder: str) -> tuple[int, int, float]:
    """Bytes, requests and processor seconds of a rank that opens the data set."""
    probe = ShardedDataset(folder)
    storage = _CountingStorage(folder, probe.storage.options)
    began = time.process_time()
    ShardedDataset(folder, storage=storage)
    return storage.bytes, int(storage.counters["requests"]), time.process_time() - began


def _open_index(ranks: int, tensors: int) -> tuple[int, int, float]:
    """Bytes, requests and processor seconds to unpickle the index of a checkpoint with the blocks
    of all ranks' optimizer state, which is made here."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "part").touch()
        data = pickle.dumps(_index(ranks, tensors))
        (path / ".metadata").write_bytes(data)
        began = time.process_time()
        read_index(path)
        return len(data), 1, time.process_time() - began


def _index(ranks: int, tensors: int) -> Metadata:
    names = [f"decoder.layers.{n}.weight" for n in range(tensors)]
    parts = [(name, 1) for name in names]
    blocks = -(-ranks * _BLOCKS // tensors) + 1
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        parts += [(f"optimizer.{kind}.{name}", blocks) for name in names]
    tensors_of, places = {}, {}
    for name, count in parts:
        offsets = [torch.Size([n, 0]) for n in range(count)]
        sizes = torch.Size([1, 4096])
        chunks = [ChunkStorageMetadata(offset, sizes) for offset in offsets]
        properties = TensorProperties(torch.float32)
        tensors_of[name] = TensorStorageMetadata(properties, torch.Size([count, 4096]), chunks)
        for offset in offsets:
            places[MetadataIndex(name, offset)] = _StorageInfo("part", 0, 0)
    return Metadata(tensors_of, storage_data=places)
