"""Table, JSON and plot of a rehearsal."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from megatron_owl2.data.sampling.prefetch import working_set
from megatron_owl2.data.sampling.shuffle import BLOCK_SIZE, SHUFFLE_BLOCK_SIZE, ShuffleOrder
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.plotting.figure import canvas
from rehearsal.cluster import Cluster, Outcome
from rehearsal.order_check import OrderProof
from rehearsal.startup import Reading
from rehearsal.store import StoreModel

_MB, _GB = 1e6, 1e9
_COLOR = "#2b6cb0"
_COLUMNS = (
    "scenario",
    "first batch s",
    "waiting",
    "hits",
    "cache GB",
    "store req/s",
    "peak",
    "store MB/s",
    "peak",
    "node MB/s",
    "retries",
)


def row(name: str, outcome: Outcome) -> list[str]:
    """The cells of a scenario; peaks are over 10 s."""
    o, total = outcome, sum(outcome.bytes.values())
    seconds = max(o.seconds, 1e-9)
    return [
        name,
        f"{o.waits[0]:.1f}",
        f"{o.waiting_share:.2%}",
        f"{o.hits / max(1, o.hits + o.misses):.2%}",
        f"{o.cached_bytes / 1e9:.2f}",
        f"{sum(o.requests.values()) * o.weight / seconds:,.0f}",
        f"{max(per_ten_seconds(o, 'requests')):,.0f}",
        f"{total * o.weight / seconds / _MB:,.0f}",
        f"{max(per_ten_seconds(o, 'bytes')) / _MB:,.0f}",
        f"{total * o.weight / seconds / _MB / o.nodes:.2f}",
        f"{o.retries * o.weight:,.0f}",
    ]


def per_ten_seconds(outcome: Outcome, kind: str) -> list[float]:
    """Requests or bytes of the store per second, averaged over 10 s."""
    values = outcome.timeline[kind]
    return [statistics.fmean(values[i : i + 10]) for i in range(0, len(values), 10)]


def scenarios_table(outcomes: dict[str, Outcome]) -> str:
    return table(_COLUMNS, [row(name, outcome) for name, outcome in outcomes.items()])


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table in Markdown, aligned for a console."""
    cells = [list(columns), *rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line(values: list[str]) -> str:
        first, *others = zip(values, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(value.rjust(width) for value, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths))
    return "\n".join([line(cells[0]), rule + "|", *map(line, rows)])


def as_json(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    return {
        name: dataclasses.asdict(outcome) | {"waiting_share": outcome.waiting_share}
        for name, outcome in outcomes.items()
    }


def draw(path: Path, title: str, outcomes: dict[str, Outcome]) -> None:
    """Traffic of the store over time, a row for each scenario; raises ReportError as `canvas`."""
    with canvas(path, title, 11, 1 + 1.1 * len(outcomes)) as figure:
        axes = figure.subplots(len(outcomes), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (name, outcome) in zip(axes, outcomes.items(), strict=True):
            traffic = [value / _GB for value in per_ten_seconds(outcome, "bytes")]
            edges = [10 * i for i in range(len(traffic) + 1)]
            axis.stairs(traffic, edges, color=_COLOR, fill=True)
            axis.set_ylim(0, 1.25 * max(traffic) or 1)
            axis.set_ylabel("GB/s")
            text = f"{name}: first batch after {outcome.waits[0]:.1f} s, then waiting "
            axis.set_title(f"{text}{outcome.waiting_share:.2%}", loc="left", fontsize=9)
        axes[-1].set_xlabel("seconds since the start; bytes from the store, averaged over 10 s")


def streams_table(cluster: Cluster, dataset: ShardedDataset, order: ShuffleOrder) -> str:
    """Streams and working set of a node, by the number of nodes."""
    columns = (
        "nodes",
        "ranks",
        "streams of a node",
        "nodes reading a block",
        "bytes read / used",
        "working set GB",
    )
    # Blocks that the shuffle blocks of all streams read, against those that they hold.
    ends = sum(len(order.blocks(stream)) for stream in range(order.streams))
    ends *= BLOCK_SIZE / SHUFFLE_BLOCK_SIZE / order.streams
    rows = []
    numbers = {1, cluster.nodes // 4, cluster.nodes // 2, cluster.nodes - 3, cluster.nodes}
    for nodes in sorted(number for number in numbers if number > 0):
        ranks, on_node = nodes * cluster.ranks_per_node, cluster.ranks_per_node
        streams = order.streams_of_nodes(ranks, on_node)
        copies = sum(streams) / order.streams
        needed = working_set([dataset], order, ranks, on_node) / _GB
        cells = f"{copies:.2f}", f"{copies * ends:.2f}", f"{needed:.2f}"
        rows.append([str(nodes), f"{ranks:,}", str(max(streams)), *cells])
    return table(columns, rows)


def start_table(start: list[Reading], model: StoreModel, interconnect: float) -> str:
    """What is read before the first step; `interconnect` in bytes per second."""
    columns = ("before the first step", "read by", "GB", "GB of a node", "requests", "seconds")
    rows = [
        [
            reading.what,
            reading.readers,
            f"{reading.bytes / _GB:,.3f}",
            f"{reading.node_bytes / _GB:,.3f}",
            f"{reading.requests:,}",
            f"{reading.seconds(model, interconnect):,.1f}",
        ]
        for reading in start
    ]
    return table(columns, rows)


def order_text(proof: OrderProof | None, seconds: float, needed: int) -> str:
    lines = [f"order: ready in {seconds:.2f} s; working set of a node {needed / _GB:.2f} GB"]
    if proof is not None:
        once = "each once" if proof.exact else "NOT EACH ONCE"
        lines.append(
            f"{proof.handed_out:,} of {proof.samples:,} samples handed out, "
            f"{proof.distinct:,} different ones: {once}"
        )
    return "\n".join(lines)
