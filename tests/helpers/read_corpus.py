"""Runs of the formats of data_prep without the job behind them."""

from collections import Counter
from pathlib import Path

import pytest
from tiny_data import encoded, make_image

from data_prep.formats.registry import FORMATS
from data_prep.splits import ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import PreprocessError


def collect(kind: str, source: Path, **options) -> tuple[list[Record], Counter]:
    """Records of all splits, and the counts of reasons why others were left out."""
    format_ = FORMATS[kind]
    splits = format_.plan(source, ReadOptions(**options)).splits
    assert len({split.name for split in splits}) == len(splits)
    items = [item for split in splits for item in format_.read(split.payload)]
    records = [item for item in items if isinstance(item, Record)]
    assert all(item.detail for item in items if isinstance(item, Skipped))
    return records, Counter(item.reason for item in items if isinstance(item, Skipped))


def refused(kind: str, source: Path, **options) -> str:
    with pytest.raises(PreprocessError) as error:
        collect(kind, source, **options)
    return str(error.value)


def write_images(folder: Path) -> Path:
    """Folder of images 0.jpg to 9.jpg and a GIF, and one image outside of it."""
    (folder / "deep").mkdir(parents=True)
    for number in range(10):
        (folder / f"{number}.jpg").write_bytes(encoded(make_image(number)))
    (folder / "deep/a.gif").write_bytes(encoded(make_image(0), "GIF"))
    (folder.parent / "secret.jpg").write_bytes(encoded(make_image(3)))
    return folder
