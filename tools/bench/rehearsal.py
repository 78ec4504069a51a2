"""Rehearsal of data loading at full scale, in simulated time, with the code that training runs.

The order, the samplers, the prefetchers, the node's cache and the retries of all data workers are
the real ones. Simulated are the clock, the object store (bandwidth, latency, errors, stragglers),
the contents of shards, computing and decoding. Of the nodes, which differ in what they read only,
`--simulated-nodes` run in full, and each loads the store like the number of nodes it stands for.

* order: every sample once, by a bitmap over all samples; global batches, over all ranks,
* scenarios: a cold start and two shuffle blocks, a slow store, nodes that were replaced, other
  numbers of nodes, caches smaller than the working set,
* start: what all ranks read before the first step, each for itself and with one reader.

Figures of seconds are the model's; requests, bytes and hits are counted.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from rehearsal import report
from rehearsal.cluster import Cluster, Outcome
from rehearsal.order_check import check_epoch, check_ranks, make_order
from rehearsal.scenarios import Corpus, open_remote, progress_of, scenarios, simulate
from rehearsal.startup import readings
from rehearsal.store import StoreModel

from megatron_owl2.data.sampling.prefetch import working_set
from megatron_owl2.data.sampling.shuffle import SHUFFLE_BLOCK_SIZE

_GB = 1e9
_RAM_DISK = "/dev/shm"  # the caches' files are small, and many


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    began = time.monotonic()
    scratch = _RAM_DISK if os.path.isdir(_RAM_DISK) else None
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        figures, outcomes, text = rehearse(options, folder)
    figures["command"] = " ".join(["tools/bench/rehearsal.py", *(arguments or sys.argv[1:])])
    figures["seconds"] = time.monotonic() - began
    print(text)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot:
        ranks = options.nodes * options.ranks_per_node
        title = f"Data loading of {ranks:,} ranks, {options.samples:,} samples, simulated"
        report.draw(Path(options.plot), title, outcomes)
    return 0


def rehearse(options: argparse.Namespace, folder: str) -> tuple[dict, dict[str, Outcome], str]:
    """All figures, the outcomes of the scenarios, and the text to show."""
    samples = options.samples // options.shards
    corpus = Corpus(options.shards, samples, options.sample_bytes, f"{folder}/shards")
    os.makedirs(corpus.folder)
    corpus.content.write_manifest(corpus.folder)
    cluster, model = _cluster(options), _model(options)
    interconnect = options.interconnect * _GB
    order, seconds = make_order(corpus.shards, samples)
    dataset = open_remote(corpus, model)
    needed = working_set([dataset], order, cluster.ranks, cluster.ranks_per_node)
    check_ranks(cluster, order, steps=2)
    wanted = scenarios(cluster, model, options.steps, needed)
    chosen = [s for s in wanted if options.scenarios is None or s.name in options.scenarios]
    with multiprocessing.get_context("fork").Pool(options.processes, maxtasksperchild=1) as pool:
        found = dict(pool.imap_unordered(simulate, [(scenario, corpus) for scenario in chosen]))
        outcomes = {scenario.name: found[scenario.name] for scenario in chosen}
        proof, share = None, options.epoch_share
        if share:
            proof = check_epoch(corpus.shards, samples, share, pool, progress_of("order"))
    weights, trained = options.weights * _GB, options.trained * _GB
    start = readings(cluster, corpus.folder, weights, trained, options.tensors)
    figures = {
        "options": vars(options),
        "order_seconds": seconds,
        "order": proof and dataclasses.asdict(proof),
        "working_set": needed,
        "scenarios": report.as_json(outcomes),
        "start": [
            dataclasses.asdict(reading) | {"seconds": reading.seconds(model, interconnect)}
            for reading in start
        ],
    }
    parts = [
        report.order_text(proof, seconds, needed),
        report.streams_table(cluster, dataset, order),
        report.scenarios_table(outcomes),
        report.start_table(start, model, interconnect),
    ]
    return figures, outcomes, "\n\n".join(parts)


def _cluster(options: argparse.Namespace) -> Cluster:
    return Cluster(
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node,
        workers=options.workers,
        prefetch=options.prefetch,
        micro_batch=options.micro_batch,
        global_batch=options.global_batch
        or options.nodes * options.ranks_per_node * options.micro_batch,
        compute_seconds=options.compute_seconds,
        decode_seconds=options.decode_ms / 1e3,
        cache_bytes=round(options.cache_gib * 2**30),
        timeout=options.timeout,
        simulated_nodes=min(options.simulated_nodes, options.nodes),
    )


def _model(options: argparse.Namespace) -> StoreModel:
    return StoreModel(
        bandwidth=options.store_gbs * _GB,
        node_bandwidth=options.node_gbs * _GB,
        connection_bandwidth=options.connection_mbs * 1e6,
        latency=options.latency_ms / 1e3,
        error_rate=options.errors,
        straggler_rate=options.stragglers,
        straggler_seconds=options.straggler_seconds,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = 2 * SHUFFLE_BLOCK_SIZE // 32 + 24  # two shuffle blocks of 256 streams and 8,192 rows
    numbers = (
        ("--nodes", 128, "nodes of the job"),
        ("--ranks-per-node", 8, "data-parallel ranks of a node"),
        ("--simulated-nodes", 4, "of them run in full"),
        ("--workers", 8, "data.workers of a rank"),
        ("--prefetch", 2, "data.prefetch"),
        ("--micro-batch", 8, "rows of a micro-batch"),
        ("--global-batch", 0, "rows of a step; 0: one micro-batch of every rank"),
        ("--shards", 40_000, "shards"),
        ("--samples", 400_000_000, "samples in all of them"),
        ("--sample-bytes", 30_000, "bytes of a sample"),
        ("--steps", steps, "steps of the longest scenarios"),
        ("--compute-seconds", 2.1, "seconds of a micro-batch"),
        ("--decode-ms", 1.5, "processor time of a sample in a worker"),
        ("--cache-gib", 50.0, "data.storage.cache_gib"),
        ("--timeout", 60.0, "data.storage.timeout"),
        ("--store-gbs", 50.0, "bandwidth of the store and of the file system, GB/s"),
        ("--node-gbs", 3.125, "bandwidth of a node to it, GB/s"),
        ("--connection-mbs", 100.0, "bandwidth of one request, MB/s"),
        ("--latency-ms", 30.0, "to the first byte, median"),
        ("--errors", 1e-3, "share of requests answered by an error"),
        ("--stragglers", 1e-3, "share of requests that start late"),
        ("--straggler-seconds", 10.0, "by so much"),
        ("--weights", 16.0, "GB of weights in a checkpoint"),
        ("--trained", 16.0, "GB of them that are trained"),
        ("--tensors", 1200, "tensors of a checkpoint's weights"),
        ("--interconnect", 50.0, "bandwidth of a node to other nodes, GB/s"),
        ("--epoch-share", 1.0, "share of an epoch that is held against the bitmap"),
        ("--processes", 2, "processes of this rehearsal"),
    )
    for name, default, text in numbers:
        text = f"{text} (default: %(default)s)"
        parser.add_argument(name, type=type(default), default=default, help=text)
    parser.add_argument("--scenarios", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--plot", metavar="FILE", help="draw traffic and waits as a PNG")
    return parser


if __name__ == "__main__":
    sys.exit(main())
