"""Data loading of some nodes of a cluster, whose other nodes are like them, in simulated time."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_owl2.data.loader import MicroBatchSampler
from megatron_owl2.data.sampling.prefetch import Prefetcher
from megatron_owl2.data.sampling.shuffle import ShuffleOrder
from megatron_owl2.data.shards.dataset import ShardedDataset
from rehearsal.simulation import Simulation
from rehearsal.store import Node, Shards, SimulatedStorage, Store, StoreModel

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Cluster:
    """Data-parallel ranks on nodes, and their loaders; `simulated_nodes` are simulated."""

    nodes: int
    ranks_per_node: int
    workers: int
    prefetch: int  # micro-batches that every worker keeps ready
    micro_batch: int
    global_batch: int
    compute_seconds: float  # of one micro-batch
    decode_seconds: float  # of one sample, in a worker
    cache_bytes: int
    timeout: float  # of a request, in seconds
    simulated_nodes: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.global_batch // self.ranks // self.micro_batch


@dataclass
class Outcome:
    """What was counted in one simulation; bytes and seconds."""

    waits: list[float]  # before each step, for the slowest rank
    seconds: float
    compute_seconds: float  # of all steps
    nodes: int
    weight: float  # nodes for which each simulated one stands
    samples_read: int  # of the simulated nodes, as everything below
    sample_bytes: int
    hits: int
    misses: int
    requests: dict[str, int]
    bytes: dict[str, int]
    retries: int
    polls: int
    cached_bytes: int  # of the fullest node
    timeline: dict[str, list[float]] = field(repr=False)  # of the whole store, by the second

    @property
    def waiting_share(self) -> float:
        """Share of the time after the first step's wait in which the slowest rank has no batch."""
        waits = sum(self.waits[1:])
        return waits / (waits + self.compute_seconds)


class _Rank:
    """Loader of one rank: workers that get micro-batches in turn, as torch's DataLoader has it."""

    def __init__(self, cluster: Cluster, loading: "Loading", rank: int, node: Node):
        residue = loading.order.residue(rank, cluster.ranks)
        sampler = MicroBatchSampler(
            loading.start_sample, residue, cluster.ranks, cluster.micro_batch, None
        )
        self._batches = iter(sampler)
        self._inboxes, self._outboxes = [], []
        self._given = self._taken = 0
        for _ in range(cluster.workers):
            self._inboxes.append(node.simulation.queue())
            self._outboxes.append(node.simulation.queue())
            loading.start_worker(node, self._inboxes[-1], self._outboxes[-1])
        for _ in range(cluster.workers * cluster.prefetch):
            self._give()

    def _give(self) -> None:
        self._inboxes[self._given % len(self._inboxes)].put(next(self._batches))
        self._given += 1

    def take(self) -> None:
        """Wait for the next micro-batch."""
        self._outboxes[self._taken % len(self._outboxes)].get()
        self._taken += 1
        self._give()


class Loading:
    """One start of a job: the processes of the simulated nodes, from a sample index on."""

    def __init__(
        self,
        cluster: Cluster,
        model: StoreModel,
        shards: Shards,
        dataset: ShardedDataset,
        order: ShuffleOrder,
        *,
        start_sample: int = 0,
        seed: int = 0,
    ):
        self.cluster, self.order, self.start_sample = cluster, order, start_sample
        self.simulation = Simulation()
        self._model, self._shards, self._dataset, self._seed = model, shards, dataset, seed
        self._readers: list[ShardedDataset] = []
        self._prefetchers: list[Prefetcher] = []
        self._samples_read = 0

    def run(self, caches: list[str], steps: int, progress: Progress) -> Outcome:
        """The first `steps` steps, with these cache folders of the simulated nodes."""
        cluster, weight = self.cluster, self.cluster.nodes / len(caches)
        with self.simulation as simulation:
            store = Store(simulation, self._model, weight, self._seed)
            settings = cluster.cache_bytes, self._shards, cluster.timeout
            nodes = [Node(store, cache, *settings) for cache in caches]
            ranks = [
                _Rank(cluster, self, rank, node)
                for number, node in enumerate(nodes)
                for rank in self._ranks_of(number * cluster.nodes // len(nodes))
            ]
            waits = []
            for step in range(steps):
                waits.append(self._step(ranks))
                progress(f"step {step + 1} of {steps}, at {simulation.monotonic():.0f} s")
            return self._outcome(store, nodes, waits)

    def start_worker(self, node: Node, inbox: Any, outbox: Any) -> None:
        """Start a data worker: what TrainingDataset does with sample indices, without decoding."""
        dataset = self._dataset.reopened(SimulatedStorage(node))
        prefetcher = Prefetcher([dataset], self.order)
        self._readers.append(dataset)
        self._prefetchers.append(prefetcher)

        def work() -> None:
            while True:
                indices = inbox.get()
                for sample_index in indices:
                    prefetcher.advance_to(sample_index)
                    _, shard, sample = self.order.sample_at(sample_index)
                    dataset.read(shard, sample)
                self._samples_read += len(indices)
                self.simulation.sleep(len(indices) * self.cluster.decode_seconds)
                outbox.put(indices)

        self.simulation.start_thread("worker", work)

    def _ranks_of(self, node: int) -> range:
        return range(node * self.cluster.ranks_per_node, (node + 1) * self.cluster.ranks_per_node)

    def _step(self, ranks: list[_Rank]) -> float:
        """A step of all ranks, which wait for each other; the seconds without computing."""
        waited = 0.0
        for _ in range(self.cluster.micro_batches):
            began = self.simulation.monotonic()
            for rank in ranks:
                rank.take()
            waited += self.simulation.monotonic() - began
            self.simulation.sleep(self.cluster.compute_seconds)
        return waited

    def _outcome(self, store: Store, nodes: list[Node], waits: list[float]) -> Outcome:
        cluster = self.cluster
        counters = [reader.storage.counters for reader in self._readers]
        seconds = self.simulation.monotonic()
        timeline = {
            kind: [store.timeline[kind, s] * store.weight for s in range(int(seconds) + 1)]
            for kind in ("requests", "bytes")
        }
        return Outcome(
            waits=waits,
            seconds=seconds,
            compute_seconds=len(waits) * cluster.micro_batches * cluster.compute_seconds,
            nodes=cluster.nodes,
            weight=store.weight,
            samples_read=self._samples_read,
            sample_bytes=self._shards.sample_bytes,
            hits=round(sum(c["cache_hits"] for c in counters)),
            misses=round(sum(c["cache_misses"] for c in counters)),
            requests=dict(store.requests),
            bytes=dict(store.bytes),
            retries=round(sum(c["retries"] for c in counters))
            + sum(prefetcher.retries for prefetcher in self._prefetchers),
            polls=self.simulation.polls,
            cached_bytes=max(node.cached_bytes for node in nodes),
            timeline=timeline,
        )


def clear(cache: str) -> None:
    """Empty the cache of a node, as that of one that was replaced."""
    shutil.rmtree(cache, ignore_errors=True)
    os.makedirs(cache)
