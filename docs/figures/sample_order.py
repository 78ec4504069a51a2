"""Picture of the order of samples, docs/figures/sample_order.png, drawn from the order itself.

python docs/figures/sample_order.py
"""

import colorsys
from pathlib import Path

from matplotlib.figure import Figure

from megatron_owl2.data.sampling.shuffle import ShuffleOrder

SHARDS, SAMPLES, BLOCK, STREAMS, SHUFFLE_BLOCK = 6, 64, 16, 4, 32
NAMES = (
    "data set of 6 shards: blocks of 16 neighbours",
    "permuted blocks, cut into 4 streams",
    "order of training: each stream shuffled inside of 32 samples, one sample of each in turn",
)


def main() -> None:
    """Write the picture beside this file."""
    order = ShuffleOrder([[SAMPLES] * SHARDS], [1.0], 1, STREAMS, BLOCK, SHUFFLE_BLOCK)
    total = SHARDS * SAMPLES
    found = [order.sample_at(index) for index in range(total)]
    places = [shard * SAMPLES + sample for _, shard, sample in found]
    streams = [[places[i] for i in range(s, total, STREAMS)] for s in range(STREAMS)]
    figure = Figure(figsize=(10, 5.2), dpi=110, layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    rows = [
        list(range(total)),
        [place for stream in streams for place in _unshuffled(stream)],
        places,
    ]
    for ax, row, name in zip(axes, rows, NAMES, strict=True):
        ax.bar(range(total), [1] * total, width=1.0, color=[_color(place) for place in row])
        ax.set_yticks([])
        ax.set_xlim(-0.5, total - 0.5)
        ax.set_title(name, loc="left", fontsize=10)
        for side in ("top", "right", "left", "bottom"):
            ax.spines[side].set_visible(False)
    length = total // STREAMS
    for stream in range(1, STREAMS):
        axes[1].axvline(stream * length - 0.5, color="black")
    axes[2].set_xlabel("sample index; one colour per shard, one shade per block")
    figure.savefig(Path(__file__).with_suffix(".png"))


def _unshuffled(stream: list[int]) -> list[int]:
    """The samples of a stream before they are shuffled: block by block, as they first appear."""
    blocks = list(dict.fromkeys(place // BLOCK for place in stream))
    members = {block: sorted(p for p in stream if p // BLOCK == block) for block in blocks}
    return [place for block in blocks for place in members[block]]


def _color(place: int) -> tuple[float, float, float]:
    shard, block = place // SAMPLES, place % SAMPLES // BLOCK
    return colorsys.hsv_to_rgb(shard / SHARDS, 0.35 + 0.18 * block, 0.95 - 0.08 * block)


if __name__ == "__main__":
    main()
