"""Synthetic shards in a simulated object store, read by the real storage code."""

import hashlib
import math
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_owl2.data.sampling.shuffle import BLOCK_SIZE
from megatron_owl2.data.shards.manifest import write_manifest
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.shards.tar import END, pack_member
from megatron_owl2.data.shards.writer import INDEX, SUMS, checksum
from megatron_owl2.data.storage.base import StorageOptions
from megatron_owl2.data.storage.cache import RangeCache
from megatron_owl2.data.storage.remote import RemoteStorage
from rehearsal.simulation import Link, Simulation

_SCALE = 4096  # real bytes for one on the disk of the simulated cache
_JPEG = b"\xff\xd8\xff"


class Shards:
    """Shards of equal samples, of which one sample and one block are in memory."""

    def __init__(self, shards: int, samples: int, sample_bytes: int):
        self.count, self.samples = shards, samples
        image = _JPEG + random.Random(0).randbytes(sample_bytes - 2048 - len(_JPEG))
        members = Record("sample", images=(image,), caption="an owl").to_members()
        self._sample = b"".join(pack_member(name, data) for name, data in members)
        self._block = self._sample * min(BLOCK_SIZE, samples)
        self.sample_bytes = len(self._sample)
        self.bytes = samples * self.sample_bytes + len(END)
        offsets = np.arange(samples + 1, dtype="<u8") * self.sample_bytes
        sums = np.full(samples, checksum(self._sample), dtype="<u8")
        self._sidecars = {INDEX: offsets.tobytes(), SUMS: sums.tobytes()}

    def write_manifest(self, folder: str) -> None:
        index, sums = (hashlib.sha256(data).hexdigest() for data in self._sidecars.values())
        row = {"samples": self.samples, "bytes": self.bytes}
        row |= {"index_sha256": index, "sums_sha256": sums}
        rows = [{"name": f"shard-{n:06d}.tar", **row} for n in range(self.count)]
        write_manifest(folder, rows)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes of a shard from the start of a sample on, of a sidecar or of a cached size."""
        suffix = os.path.splitext(name)[1]
        if suffix in self._sidecars:
            return self._sidecars[suffix][start:stop]
        return b"%020d" % self.bytes if suffix == ".size" else self._block[: stop - start]


@dataclass(frozen=True)
class StoreModel:
    """Behaviour of an object store: bytes per second, seconds, and shares of the requests."""

    bandwidth: float
    node_bandwidth: float
    connection_bandwidth: float
    latency: float  # to the first byte, the median of a log-normal distribution with sigma 0.5
    error_rate: float  # answered by an error
    straggler_rate: float  # whose first byte takes `straggler_seconds` more
    straggler_seconds: float


class Store:
    """Object store of a simulation, in which every simulated node stands for `weight` like it."""

    def __init__(self, simulation: Simulation, model: StoreModel, weight: float, seed: int):
        self.simulation, self.model, self.weight = simulation, model, weight
        self.random = random.Random(seed)
        self.link = Link(simulation, model.bandwidth, math.inf)
        self.requests: Counter[str] = Counter()  # by kind, errors included
        self.bytes: Counter[str] = Counter()
        self.timeline: Counter[tuple[str, int]] = Counter()  # (requests or bytes, second)

    def count_request(self, kind: str) -> None:
        self.requests[kind] += 1
        self.timeline["requests", int(self.simulation.monotonic())] += 1

    def count_bytes(self, kind: str, size: int) -> None:
        """Count a whole answer, when it has come."""
        self.bytes[kind] += size
        self.timeline["bytes", int(self.simulation.monotonic())] += size


class Node:
    """Node with a network link and a cache folder."""

    def __init__(
        self, store: Store, cache: str, cache_bytes: int, shards: Shards, timeout: float = 60.0
    ):
        self.store, self.shards = store, shards
        self.simulation = store.simulation
        # The cache sees files of a 4096th of their size; the limit is scaled with them.
        limit = max(1, cache_bytes // _SCALE)
        self.options = StorageOptions(cache=cache, cache_bytes=limit, timeout=timeout)
        self.link = Link(
            self.simulation, store.model.node_bandwidth, store.model.connection_bandwidth
        )

    @property
    def cached_bytes(self) -> int:
        """Bytes that the cache holds, as it counts them."""
        try:
            with open(os.path.join(self.options.cache, ".usage")) as file:
                return int(file.read()) * _SCALE
        except FileNotFoundError:
            return 0

    def request(self, kind: str, size: int) -> None:
        """A request of `size` bytes: returns when it is answered, raises what a client raises."""
        store, model, chance = self.store, self.store.model, self.store.random
        store.count_request(kind)
        latency = model.latency * math.exp(0.5 * chance.gauss(0, 1))
        if chance.random() < model.straggler_rate:
            latency += model.straggler_seconds
        timeout = self.options.timeout
        self.simulation.sleep(min(latency, timeout))
        if latency >= timeout:
            raise TimeoutError(f"no whole answer within {timeout:g} s")
        if chance.random() < model.error_rate:
            raise OSError("503 Service Unavailable")
        if size:
            self._transfer(size, timeout - latency)
            store.count_bytes(kind, size)

    def _transfer(self, size: int, timeout: float) -> None:
        simulation, task = self.simulation, self.simulation.current
        links = [(self.link, size), (self.store.link, size * self.store.weight)]
        left, late = len(links), False

        def done() -> None:
            nonlocal left
            left -= 1
            if not left and not late:
                simulation.resume_at(simulation.monotonic(), task)

        def expire() -> None:
            nonlocal late
            if left:
                late = True
                simulation.resume_at(simulation.monotonic(), task)

        transfers = [(link, link.start(amount, done)) for link, amount in links]
        simulation.resume_at(simulation.monotonic() + timeout, expire)
        simulation.block()
        if late:
            for link, transfer in transfers:
                link.cancel(transfer)
            raise TimeoutError("no whole answer within the time limit")


class SimulatedStorage(RemoteStorage):
    """RemoteStorage of one process of a simulated node: only the requests and the bytes on the
    cache's disk are others."""

    def __init__(self, node: Node):
        super().__init__("memory://shards", node.options, node.simulation)
        self.node = node
        self._cache: Any = _ScaledCache(node)

    def __deepcopy__(self, memo) -> "SimulatedStorage":
        return SimulatedStorage(self.node)

    def _request(self, method: str, name: str, **arguments) -> Any:
        if method == "_info":
            self.node.request("size", 0)
            return {"size": self.node.shards.bytes}
        kind = "block" if name.endswith(".tar") else "sidecar"
        start, stop = arguments["start"], arguments["end"]
        self.node.request(kind, stop - start)
        return self.node.shards.read(name, start, stop)

    def _new_process(self):
        process = super()._new_process()
        process.random.seed(self.node.store.random.random())
        return process


class _ScaledCache:
    """RangeCache with files of a 4096th of their size, whose contents are made when read."""

    def __init__(self, node: Node):
        options = node.options
        self._read = node.shards.read
        self._cache = RangeCache(
            options.cache, "memory://shards", options.cache_bytes, node.simulation
        )

    def read(self, name: str, extent: tuple[int, int], start: int, stop: int) -> bytes | None:
        small = _scaled(extent)
        found = self._cache.read(name, small, *small)
        return None if found is None else self._read(name, start, stop)

    def drop(self, name: str, extent: tuple[int, int]) -> None:
        self._cache.drop(name, _scaled(extent))

    def fill(
        self, name: str, extent: tuple[int, int], fetch: Callable[[], bytes], patience: float
    ) -> bytes | None:
        small, fetched = _scaled(extent), []

        def shrunk() -> bytes:
            fetched.append(fetch())
            return bytes(small[1] - small[0])

        found = self._cache.fill(name, small, shrunk, patience)
        return None if found is None else fetched[0]


def _scaled(extent: tuple[int, int]) -> tuple[int, int]:
    start = extent[0] // _SCALE
    return start, start + max(1, (extent[1] - extent[0]) // _SCALE)
