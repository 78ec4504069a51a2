"""Packing of the paper's instruction mixture: fill of rows, planning, balance and speed of a step.

python tools/bench/packing.py [CONFIG] [--tiny]

Lengths are simulated (instruction_mixture.py). The first table is of the rows of an epoch: what
they hold, the processor time and memory of planning them, the rows that stand for 256 samples, and
the spread over data-parallel ranks in a step, as the rows come and balanced. The second is of
training steps of a small model on the CPU in fp32: the same samples packed, padded to the longest
of their micro-batch and padded to whole rows, in turn, so that a busy machine is busy for all.
Micro-batches have as many rows in each, which is what bounds their memory.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import instruction_mixture
import numpy as np
import step
import torch

from megatron_owl2.config.load import load_config
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.data.batch import Batch, collate
from megatron_owl2.data.conversation import Sample
from megatron_owl2.data.lengths import SampleLengths
from megatron_owl2.data.row_length import row_alignment
from megatron_owl2.data.sampling.packed_order import PackedOrder, Packing
from megatron_owl2.data.sampling.shuffle import ShuffleOrder
from megatron_owl2.mcore import setup

RECIPE = Path(__file__).parent.parent.parent / "examples" / "7b" / "finetune.yaml"
SHARD = 10_000  # samples
BATCH = 256  # samples of a step of the paper
RANKS = (8, 32)
SCALE = 4  # by which the rows of the small model are shorter, and texts and images with them
SMALL = [
    *("model.vision.image_size=56", "model.vision.hidden_size=64", "model.vision.num_layers=2"),
    *("model.vision.num_heads=4", "model.vision.ffn_size=256", "model.abstractor.num_queries=16"),
    *("model.abstractor.num_layers=1", "model.abstractor.num_heads=4"),
    *("model.abstractor.ffn_size=176", "model.decoder.hidden_size=256"),
    *("model.decoder.num_heads=8", "model.decoder.num_kv_heads=8", "model.decoder.ffn_size=688"),
    *("model.decoder.vocab_size=2048", "model.decoder.num_layers=4", "data.sequence_length=512"),
    *("train.precision=fp32", "kernels.elementwise=plain"),
]
TINY = [
    *("model.vision.num_layers=1", "model.decoder.hidden_size=64", "model.decoder.ffn_size=96"),
    *("model.decoder.num_layers=1", "model.decoder.vocab_size=128"),
]


def packed_order(config: RunConfig, lengths: Sequence[SampleLengths], group: int) -> PackedOrder:
    """The order of a run over such data sets, each sample once an epoch, in shards of SHARD."""
    counts = [len(of.text) for of in lengths]
    sizes = [[SHARD] * (n // SHARD) + ([n % SHARD] if n % SHARD else []) for n in counts]
    samples = ShuffleOrder(sizes, counts, config.data.seed)
    packing = Packing(
        lengths,
        tokens_per_image=config.model.tokens_per_image,
        row_length=config.data.sequence_length,
        images_per_row=config.data.images_per_row,
        group=group,
    )
    return PackedOrder(samples, packing, sizes, group)


def spreads(rows: np.ndarray, ranks: int) -> np.ndarray:
    """The largest less the smallest sum of a rank's rows, in a mean step; rows are [steps, rows of
    a step, 2], which ranks take in turn."""
    steps, count, _ = rows.shape
    of_ranks = rows.reshape(steps, count // ranks, ranks, 2).sum(1)
    return (of_ranks.max(1) - of_ranks.min(1)).mean(0)


def row_figures(config: RunConfig, samples: int) -> dict[str, str]:
    """Figures of the rows of an epoch, in words; planned twice, balanced and as they come."""
    lengths = instruction_mixture.draw(samples)
    count, group = sum(len(of.text) for of in lengths), config.train.global_batch_size
    seconds, tables = [], []
    for together in (group, 1):
        order = packed_order(config, lengths, together)
        begin = time.process_time()
        total = order.rows_before(1)
        seconds.append(time.process_time() - begin)
        whole = total // group * group
        specs = [order.row(index) for index in range(whole)]
        tables.append(np.array([(row.images, row.positions) for row in specs]))
    images, positions = tables[0].T
    found = {
        "samples": f"{count:,}",
        "positions of a sample": f"{positions.sum() * total / whole / count:.0f}",
        "rows": f"{total:,} of {config.data.sequence_length}",
        "fill": f"{order.fill():.2%}",
        "samples a row": f"{count / total:.2f}",
        "images a row": f"{images.mean():.2f}, at most {images.max()}",
        "positions to an image": f"{config.data.sequence_length / images.mean():.0f}",
        f"rows of {BATCH} samples": f"{BATCH * total / count:.1f}",
        f"samples in {group} rows": f"{group * count / total:.0f}",
        "seconds to plan": f"{min(seconds):.2f}",
        "MiB of the plan": f"{order.nbytes / 2**20:.1f}",
    }
    balanced, alone = (table.reshape(-1, group, 2) for table in tables)
    for ranks in (ranks for ranks in RANKS if group % ranks == 0):
        before, after = spreads(alone, ranks), spreads(balanced, ranks)
        mean = positions.sum() / len(positions) * group / ranks
        found[f"spread over {ranks} ranks"] = (
            f"{after[0]:.1f} images and {after[1] / mean:.1%} of the positions; as they come "
            f"{before[0]:.1f} and {before[1] / mean:.1%}"
        )
    return found


def small_config(rows: int, tiny: bool) -> RunConfig:
    """The recipe with a small model on one rank, its rows, so many in a micro-batch, and images
    SCALE times shorter."""
    config = load_config(RECIPE, [*SMALL, *(TINY if tiny else [])])
    config.train.micro_batch_size = config.train.global_batch_size = rows
    return config


def make_sample(config: RunConfig, length: int, images: int, seed: int) -> Sample:
    """A sample of random ids, its images first; every text id is a target."""
    chance, size = np.random.default_rng(seed), config.model.vision.image_size
    tokens = chance.integers(3, config.model.decoder.vocab_size, length)
    modality = (np.arange(length) < images * config.model.tokens_per_image).astype(np.int64)
    labels = np.where(np.roll(modality, -1) == 1, -100, np.roll(tokens, -1))
    labels[-1] = -100
    pixels = chance.integers(0, 256, (images, 3, size, size), np.uint8)
    return Sample(tokens, labels, modality, images, images=[*torch.from_numpy(pixels)])


def micro_batches(config: RunConfig, rows: Sequence[Sequence[Sample]], **options) -> list[Batch]:
    """Batches of `train.micro_batch_size` rows each; the last may have fewer."""
    size = config.train.micro_batch_size
    options = {"packed": False, "row_alignment": row_alignment(config)} | options
    return [
        collate(
            rows[start : start + size],
            row_indices=range(start, min(start + size, len(rows))),
            image_size=config.model.vision.image_size,
            sequence_length=config.data.sequence_length,
            **options,
        )
        for start in range(0, len(rows), size)
    ]


def step_batches(config: RunConfig, count: int) -> dict[str, list[Batch]]:
    """The micro-batches of one step on the same samples, those of `count` packed micro-batches."""
    full = instruction_mixture.draw(20_000)
    lengths = [SampleLengths(-(-of.text // SCALE), of.images) for of in full]
    order = packed_order(config, lengths, config.train.micro_batch_size)
    specs = [order.row(index) for index in range(count * config.train.micro_batch_size)]
    chosen = sorted(index for row in specs for index in row.sample_indices)
    made = {}
    for index in chosen:  # in the order of training, which is shuffled
        dataset, shard, sample = order.order.sample_at(index)
        where = np.array([shard * SHARD + sample])
        (length,), (images,) = order.packing.demand(dataset, where)
        made[index] = make_sample(config, int(length), int(images), index)
    rows = [[made[index] for index in row.sample_indices] for row in specs]
    alone = [[made[index]] for index in chosen]
    return {
        "packed": micro_batches(config, rows, packed=True),
        "padded to the longest": micro_batches(config, alone),
        "padded to full rows": micro_batches(
            config, alone, row_alignment=config.data.sequence_length
        ),
    }


def step_figures(config: RunConfig, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Real tokens per second and the share of padding, by what becomes of the samples."""
    batches = step_batches(config, count)
    tool = step.Step(config)
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(rounds + 1):
        for name in batches:
            tool.batches = batches[name]
            spent = sum(tool.milliseconds()) / 1e3
            if turn:  # the first fills caches
                seconds[name].append(spent)
    setup.shutdown()
    tokens = {name: sum(int(b.lengths.sum()) for b in of) for name, of in batches.items()}
    computed = {name: sum(b.tokens.numel() for b in of) for name, of in batches.items()}
    return {
        name: {
            "tokens per second": tokens[name] / statistics.median(seconds[name]),
            "padding": 1 - tokens[name] / computed[name],
        }
        for name in batches
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", type=Path, default=RECIPE)
    parser.add_argument("--samples", type=int, default=instruction_mixture.SAMPLES, metavar="N")
    parser.add_argument("--micro-batches", type=int, default=2, metavar="N", help="packed, a step")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="of the steps (default 5)")
    parser.add_argument("--tiny", action="store_true", help="few samples and a toy model")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.samples, options.micro_batches, options.rows, options.rounds = 30_000, 1, 2, 1
    for name, figure in row_figures(load_config(options.config), options.samples).items():
        print(f"{name:<24}{figure}")
    small = small_config(options.rows, options.tiny)
    found = step_figures(small, options.micro_batches, options.rounds)
    title = f"{options.rows} rows a micro-batch"
    print(f"\n{title:<24}{'tokens/s':>10}{'padding':>9}{'packed is':>11}")
    most = found["packed"]["tokens per second"]
    for name, figures in found.items():
        speed, padding = figures["tokens per second"], figures["padding"]
        print(f"{name:<24}{speed:>10,.0f}{padding:>9.1%}{most / speed:>10.2f} x")


if __name__ == "__main__":
    main()
