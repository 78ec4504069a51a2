"""Measurement of the lengths of a data set's samples, which packing plans rows by."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.map_shards import check_writable, map_shards
from megatron_owl2.config.templates import Template
from megatron_owl2.data.conversation import measure
from megatron_owl2.data.lengths import SampleLengths, file_name, to_bytes
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import BadSampleError
from megatron_owl2.utils.files import write_atomically


@dataclass(frozen=True)
class Measured:
    """Lengths of all samples, the file that holds them, and how many samples cannot be read."""

    path: Path
    lengths: SampleLengths
    bad: int


def measure_lengths(
    directory: Path, tokenizer: Tokenizer, template: Template, workers: int = 1
) -> Measured:
    """The lengths of a folder of shards, written beside them; images are not decoded.

    Raises ShardError if the folder is no data set, or a shard not what its manifest says, or if it
    may not be written to.
    """
    dataset = ShardedDataset(str(directory))
    check_writable(directory)
    work = partial(_measure_shard, dataset, tokenizer, template)
    sizes = {index: row["bytes"] for index, row in enumerate(dataset.shards)}
    tables = dict(map_shards(work, sizes, workers, "measure"))
    text, images = np.concatenate([tables[index] for index in sizes], axis=1)
    lengths = SampleLengths(text.copy(), images.copy())
    path = directory / file_name(tokenizer, template)
    write_atomically(path, to_bytes(lengths, dataset))
    return Measured(path, lengths, int((text == 0).sum()))


def _measure_shard(
    dataset: ShardedDataset, tokenizer: Tokenizer, template: Template, index: int
) -> np.ndarray:
    """Ids of text and images, int32 [2, n], of a shard's samples; zeros for one that is bad."""
    found = np.zeros((2, dataset.sizes[index]), dtype=np.int32)
    for number in range(dataset.sizes[index]):
        try:
            found[:, number] = measure(dataset.read(index, number), tokenizer, template)
        except BadSampleError:
            continue
    return found
