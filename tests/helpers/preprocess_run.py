"""Runs of tools/preprocess_data.py and of the job behind it, for the tests of preprocessing."""

import json
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

from paths import HELPERS, ROOT, TOOLS
from tiny_data import encoded, make_image

from data_prep.job import Outcome, preprocess
from data_prep.splits import InputPlan, InputSplit, Skipped
from data_prep.worker import Settings
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.shards.records import Record

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, HELPERS)))}


def command(*arguments) -> list[str]:
    return [sys.executable, str(TOOLS / "preprocess_data.py"), *map(str, arguments)]


def tool(source, kind, output, *more) -> SimpleNamespace:
    """Exit status and output of the tool, run in this process, which saves time."""
    arguments = ("--input", source, "--format", kind, "--output", output, *more)
    main = runpy.run_path(command()[1])["main"]
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            status = main(list(map(str, arguments)))
        except SystemExit as error:
            status = error.code
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def succeeded(result: SimpleNamespace) -> str:
    assert result.status == 0, result.err
    return result.out


def failed(result: SimpleNamespace) -> str:
    assert result.status in (1, 2), result.out
    return result.err


def records(folder: Path) -> list[Record]:
    data = ShardedDataset(folder)
    return [data.read(s, i) for s, size in enumerate(data.sizes) for i in range(size)]


def keys(folder: Path) -> list[str]:
    return [record.key for record in records(folder)]


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pair(key: str, image: bytes | None = None, caption: str = "a caption", **metadata) -> Record:
    """Caption with its own small image, or with `image`."""
    image = encoded(make_image(sum(key.encode()))) if image is None else image
    return Record(key, images=(image,), caption=caption, metadata=metadata)


def pairs(splits: int, size: int) -> list[list[Record]]:
    """Records in splits; all keys and all images are different."""
    return [
        [
            pair(f"{split}-{i:04d}", encoded(make_image(split * size + i)), f"caption {split} {i}")
            for i in range(size)
        ]
        for split in range(splits)
    ]


def read_list(items: list[Record | Skipped]) -> Iterator[Record | Skipped]:
    """Reader of splits whose payload is their samples."""
    yield from items


def as_splits(contents: list[list[Record | Skipped]]) -> list[InputSplit]:
    return [
        InputSplit(f"part{i}", str(i), items, Path(f"input{i}")) for i, items in enumerate(contents)
    ]


def job(contents: list[list[Record | Skipped]], output: Path, **options) -> Outcome:
    """Run of the job on samples in splits; options of Settings and of preprocess."""
    names = ("workers", "partition", "merge")
    run = {name: options.pop(name) for name in names if name in options}
    settings = Settings(**({"read": read_list} | options))
    return preprocess(InputPlan(as_splits(contents)), settings, output, {}, **run)
