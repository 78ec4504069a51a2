"""Rows that a stage computes, padding included, before and after they are cut to their longest.

python tools/bench/rows.py [CONFIG]

Lengths of captions are drawn as COYO-700M's are described (its README gives the mean of its GPT-2
tokens, 17.24, and of its words, 11.13; no more): log-normal, with a mean that allows for LLaMA's
smaller vocabulary and a deviation that is assumed, so several are shown. A row is an image, BOS,
the caption and EOS. Counted are the positions of the decoder and the rows of the output layer, both
against rows of `data.sequence_length`; ratios hold for these lengths, whatever the machine.
"""

import argparse
from pathlib import Path

import numpy as np

from megatron_owl2.config.load import load_config
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.data.row_length import padded_length, row_alignment

RECIPE = Path(__file__).parent.parent.parent / "examples" / "7b" / "pretrain.yaml"
MEAN_TOKENS = 17.24 * 1.2  # of a caption; LLaMA has 32,000 pieces where GPT-2 has 50,257
LEAST = 3
SIGMAS = (0.5, 0.7, 0.9)  # of the logarithm


def caption_rows(config: RunConfig, sigma: float, samples: int) -> np.ndarray:
    """Positions of rows that are not padding, int64 [samples]; captions that are too long are
    cut, as training cuts them."""
    median = np.log(MEAN_TOKENS) - sigma**2 / 2
    captions = np.random.default_rng(0).lognormal(median, sigma, samples)
    captions = np.maximum(captions.round().astype(np.int64), LEAST)
    rows = config.model.tokens_per_image + 2 + captions
    return np.minimum(rows, config.data.sequence_length)


def padded_lengths(config: RunConfig, rows: np.ndarray, together: int = 1) -> np.ndarray:
    """Length of every micro-batch, `together` of which have the same, int64 [micro-batches]."""
    size = config.train.micro_batch_size
    longest = rows.reshape(-1, size * together).max(axis=1)
    alignment, most = row_alignment(config), config.data.sequence_length
    return np.repeat([padded_length(int(row), alignment, most) for row in longest], together)


def figures(config: RunConfig, sigma: float, micro_batches: int) -> dict:
    """Ratios and shapes for one spread of the lengths."""
    size, full = config.train.micro_batch_size, config.data.sequence_length
    rows = caption_rows(config, sigma, micro_batches * size)
    alone, steps = (padded_lengths(config, rows, together) for together in (1, 8))
    return {
        "mean tokens of a row": rows.mean(),
        "fewer positions": full / alone.mean(),
        "padding of these": 1 - rows.sum() / (alone.sum() * size),
        "shapes": len(set(alone.tolist())),
        "fewer, 8 micro-batches alike (pipeline)": full / steps.mean(),
        "fewer rows of the output layer": full / (rows - config.model.tokens_per_image).mean(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", type=Path, default=RECIPE)
    parser.add_argument("--micro-batches", type=int, default=8000)
    options = parser.parse_args(arguments)
    config = load_config(options.config)
    print(
        f"{config.train.micro_batch_size} rows of up to {config.data.sequence_length} positions, "
        f"in multiples of {row_alignment(config)}; captions of {MEAN_TOKENS:.1f} tokens on average"
    )
    found = {sigma: figures(config, sigma, options.micro_batches) for sigma in SIGMAS}
    print("| | " + " | ".join(f"sigma {sigma}" for sigma in SIGMAS) + " |")
    print("|---" * (1 + len(SIGMAS)) + "|")
    for name in found[SIGMAS[0]]:
        print(f"| {name} | " + " | ".join(f"{found[s][name]:.3g}" for s in SIGMAS) + " |")


if __name__ == "__main__":
    main()
