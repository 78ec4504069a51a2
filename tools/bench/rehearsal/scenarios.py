"""Scenarios of a rehearsal: what changes, and the run of one in a process of its own."""

import dataclasses
import os
import sys
import tempfile
import time
from dataclasses import dataclass

from megatron_owl2.data.shards.dataset import ShardedDataset
from rehearsal.cluster import Cluster, Loading, Outcome, Progress, clear
from rehearsal.order_check import make_order
from rehearsal.simulation import Simulation
from rehearsal.store import Node, Shards, SimulatedStorage, Store, StoreModel

_SLOWER = 100  # times, a slow store's bandwidth
_RESTART_STEPS = 20  # before a node is replaced, and after


@dataclass(frozen=True)
class Scenario:
    """One simulation; `replaced` is a second start, of which the first simulated node's cache
    is empty, and so those of the nodes it stands for."""

    name: str
    cluster: Cluster
    model: StoreModel
    steps: int
    replaced: bool = False


@dataclass(frozen=True)
class Corpus:
    """Shards of equal samples, with their manifest in `folder`."""

    shards: int
    samples: int  # of a shard
    sample_bytes: int
    folder: str

    @property
    def content(self) -> Shards:
        return Shards(self.shards, self.samples, self.sample_bytes)


def scenarios(cluster: Cluster, model: StoreModel, steps: int, needed: int) -> list[Scenario]:
    """What is simulated; `needed` is the working set of a node in bytes."""
    few = dataclasses.replace(cluster, simulated_nodes=min(2, cluster.simulated_nodes))
    slow = dataclasses.replace(
        model, bandwidth=model.bandwidth / _SLOWER, latency=model.latency * 10
    )
    half = dataclasses.replace(
        cluster,
        nodes=max(1, cluster.nodes // 2),
        simulated_nodes=min(cluster.simulated_nodes, max(1, cluster.nodes // 2)),
    )
    odd = max(1, cluster.nodes - 3)
    per_rank = cluster.global_batch // cluster.ranks
    fewer = dataclasses.replace(
        cluster,
        nodes=odd,
        global_batch=per_rank * odd * cluster.ranks_per_node,
        simulated_nodes=1,
    )
    found = [
        Scenario("baseline", cluster, model, steps),
        Scenario("slow store", cluster, slow, steps),
        Scenario("nodes replaced", cluster, model, _RESTART_STEPS, replaced=True),
        Scenario("half the nodes", half, model, steps // 2),
        Scenario("3 nodes fewer", fewer, model, max(1, steps // 5)),
    ]
    for name, part in (("cache 1/2", 0.5), ("cache 1/4", 0.25)):
        small = dataclasses.replace(few, cache_bytes=round(part * needed))
        found.append(Scenario(name, small, model, max(1, steps // 2)))
    return found


def simulate(work: tuple[Scenario, Corpus]) -> tuple[str, Outcome]:
    """One scenario, in a process of its own."""
    scenario, corpus = work
    shards = corpus.content
    order, _ = make_order(corpus.shards, corpus.samples)
    dataset = ShardedDataset(corpus.folder)
    progress = progress_of(scenario.name)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(corpus.folder)) as folder:
        caches = [f"{folder}/{node}" for node in range(scenario.cluster.simulated_nodes)]
        for cache in caches:
            os.makedirs(cache)
        parts = scenario.cluster, scenario.model, shards, dataset, order
        outcome = Loading(*parts).run(caches, scenario.steps, progress)
        if scenario.replaced:
            clear(caches[0])
            consumed = scenario.steps * scenario.cluster.global_batch
            again = Loading(*parts, start_sample=consumed, seed=1)
            outcome = again.run(caches, scenario.steps, progress)
    return scenario.name, outcome


def open_remote(corpus: Corpus, model: StoreModel) -> ShardedDataset:
    """The data set as lying in the object store, without a simulation that runs."""
    node = Node(Store(Simulation(), model, 1.0, 0), "", 1, corpus.content)
    return ShardedDataset(corpus.folder).reopened(SimulatedStorage(node))


def progress_of(name: str) -> Progress:
    """A function that shows a line every few seconds."""
    shown = time.monotonic()

    def show(line: str) -> None:
        nonlocal shown
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"{name}: {line}" if name else line, file=sys.stderr, flush=True)

    return show
