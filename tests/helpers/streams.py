"""Small data sets and the batches of them, for tests of the stream and of its workers."""

from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_data import LetterTokenizer, encoded, make_image, record, write

from megatron_owl2.config.schema import DataConfig, SourceConfig
from megatron_owl2.config.templates import OWL2
from megatron_owl2.data.batch import Batch
from megatron_owl2.data.images import STRETCH
from megatron_owl2.data.loader import build_loader
from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.data.sampling.phases import first_phase
from megatron_owl2.data.shards.dataset import open_sources
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.training_order import TrainingOrder

ROWS, SIZE = 3, 14


def two_sets(root: Path) -> list[Path]:
    """Shards of 60 records whose keys begin with a, and of 25 with b."""
    return [
        write(root / "a", (record(i, "a") for i in range(60)), samples_per_shard=16),
        write(root / "b", (record(i, "b") for i in range(25)), samples_per_shard=10),
    ]


def pairs(source: str, count: int) -> Iterator[Record]:
    """Captions with small images of several sizes."""
    for i in range(count):
        image = encoded(make_image(i, 24 + i % 5, 20 + i % 7))
        yield Record(f"{source}{i:04d}", images=(image,), caption=f"{source} {i}")


def config(*folders, weights=(0.6, 0.4), **changes) -> DataConfig:
    sources = [SourceConfig(str(f), w) for f, w in zip(folders, weights, strict=False)]
    values = dict(sources=sources, sequence_length=72, workers=0, augment=True, seed=3)
    return DataConfig(**{**values, "max_bad_fraction": 0.9, **changes})


def loader(
    data: DataConfig,
    start=0,
    rank=0,
    ranks=1,
    micro=4,
    tokenizer=None,
    phase=None,
    decode_images=True,
    to_square=STRETCH,
    **options,
):
    datasets = open_sources(data)
    return build_loader(
        data,
        datasets,
        TrainingOrder(data, datasets, phase or first_phase(data, datasets)),
        SampleBuilder(
            tokenizer or LetterTokenizer(),
            OWL2,
            tokens_per_image=ROWS,
            image_size=SIZE,
            sequence_length=data.sequence_length,
            max_images=data.images_per_row,
            decode_images=decode_images,
            to_square=to_square,
        ),
        row_alignment=data.sequence_length,
        micro_batch_size=micro,
        start_sample=start,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        **options,
    )


def assert_equal(a: Batch, b: Batch, ignore=()) -> None:
    for name, value in vars(a).items():
        if name in ("measurements", *ignore):
            continue
        other = getattr(b, name)
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


def rows_of(batches: list[Batch]) -> dict[int, tuple]:
    """What each sample index holds, image included, whatever batch it came in."""
    rows = {}
    for batch in batches:
        count = 0
        for row, sample_index in enumerate(batch.sample_indices.tolist()):
            pixels = b""
            if batch.modality[row].any():
                pixels = batch.image[count].numpy().tobytes()
                count += 1
            labels = batch.labels[row].tolist()
            rows[sample_index] = (batch.keys[row], batch.tokens[row].tolist(), labels, pixels)
    return rows
