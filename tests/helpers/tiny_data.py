"""Small data for the data tests: images, records, finished data sets."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_owl2.data.batch import Batch, collate
from megatron_owl2.data.conversation import Sample
from megatron_owl2.data.shards.records import Record, Turn
from megatron_owl2.data.shards.writer import ShardWriter


def make_image(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A smooth random image."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def record(index: int, source: str = "tiny") -> Record:
    """In turn a caption with an image, a conversation with an image, a text conversation."""
    key = f"{source}{index:05d}"
    if index % 3 == 2:
        return Record(key, turns=(Turn(f"say {index}", f"it is {index}"),), source=source)
    image = encoded(make_image(index), "PNG" if index % 2 else "JPEG")
    if index % 3 == 0:
        return Record(key, images=(image,), caption=f"picture {index}", source=source)
    turns = (Turn("<|image|>what number?", str(index)), Turn("sure?", "yes"))
    return Record(key, images=(image,), turns=turns, source=source, metadata={"index": index})


def write(directory: Path, records: Iterable[Record], samples_per_shard: int = 10) -> Path:
    with ShardWriter(directory, samples_per_shard) as writer:
        for item in records:
            writer.write(item)
    return directory


class LetterTokenizer:
    """One id per character from 3 on; the ids can be checked by hand."""

    bos_id, eos_id, pad_id = 1, 2, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def one_per_row(
    samples: Sequence[Sample], image_size: int, length: int, row_alignment: int = 16, first: int = 0
) -> Batch:
    """The batch of samples that have a row each; its row indices begin at `first`."""
    return collate(
        [[sample] for sample in samples],
        row_indices=range(first, first + len(samples)),
        image_size=image_size,
        row_alignment=row_alignment,
        sequence_length=length,
        packed=False,
    )
