"""The data engine against webdataset, in one run on this machine.

Makes shards of random images in DIRECTORY and measures, in interleaved rounds on one thread,

* reading: this project's stream (order, checksums, tokens and labels included) without and with
  data.scaled_decoding, webdataset with Pillow, and webdataset with the same fast decoder; all end
  in uint8 batches of random crops, of 224 pixels as in pre-training and of 448 as in tuning,
* what scaled decoding changes of pixels,
* writing: ShardWriter with index and checksums against webdataset.ShardWriter,
* indexing shards as webdataset writes them by default (jpg, txt, json and PAX headers), and plain
  ones; checksums of every sample included, against a scan of the headers with tarfile,
* manifest and order of 400 million samples in 40,000 shards, in a process of its own,
* with --memory N, the resident memory of a data worker over N samples.

Ratios are medians over the rounds of processor time per sample; figures hold for this machine.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
import webdataset
from reading import (
    BATCH,
    make_records,
    make_tokenizer,
    open_ours,
    pillow_crop,
    read_ours,
    read_webdataset,
    scaled_differences,
)

from data_prep.index import index_shard
from megatron_owl2.data import images
from megatron_owl2.data.shards.manifest import write_manifest
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.shards.writer import ShardWriter
from megatron_owl2.data.tokenizer import Tokenizer

SHARD = 500
OURS, SCALED = "this project", "this project, scaled decoding"
PILLOW, FAST = "webdataset + Pillow", "webdataset + fast decoder"
SMALL, LARGE = (512, 384), (1280, 960)  # pixels of the images
READING = {
    (image, size): f"read {image[0]} x {image[1]}, {size} pixels"
    for image, size in ((SMALL, 224), (SMALL, 448), (LARGE, 224))
}
CONTESTS = (*READING.values(), "write", "index, webdataset's", "index, plain")
ORDER = """
import json, sys, time
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.sampling.shuffle import ShuffleOrder

def timed(work):
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3

start = time.perf_counter()
dataset = ShardedDataset(sys.argv[1])
opened = time.perf_counter()
order = ShuffleOrder([dataset.sizes], [1.0], 1)
order.sample_at(0)
ready = time.perf_counter()
epoch = order.samples_per_epoch
seeks = [timed(lambda: order.sample_at(s)) for s in (123_456_789, 399_999_999, 5, 200_000_000)]
other = timed(lambda: order.sample_at(3 * epoch + 7))
peak = next(x.split()[1] for x in open("/proc/self/status") if x.startswith("VmHWM"))
print(json.dumps({"samples": epoch, "open_seconds": opened - start, "ready_seconds": ready - opened,
                  "seek_milliseconds": max(seeks), "other_epoch_milliseconds": other,
                  "peak_megabytes": int(peak) / 1e3}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="must not exist")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="samples of a worker")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if options.directory.exists():
        parser.error(f"{options.directory} exists already")
    if options.memory and options.memory < 2 * BATCH:
        parser.error(f"--memory {options.memory}: two batches, {2 * BATCH} samples, are the least")
    torch.set_num_threads(1)
    options.directory.mkdir(parents=True)
    try:
        figures = measure(options.directory, options.samples, options.rounds, options.memory)
    finally:
        shutil.rmtree(options.directory)
    print(table(figures))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def measure(folder: Path, samples: int, rounds: int, memory: int) -> dict:
    """Processor seconds per sample of every contender in every round, and the rest."""
    tokenizer = make_tokenizer(folder)
    figures = {}
    if memory:  # first: what others leave of memory counts as a worker's once it writes there
        figures["memory"] = worker_memory(folder, tokenizer, memory)
    records = {
        SMALL: list(make_records(samples, *SMALL)),
        LARGE: list(make_records(max(BATCH, samples // 8), *LARGE)),
    }
    for image, group in records.items():
        with ShardWriter(folder / str(image[0]), SHARD) as writer:
            for record in group:
                writer.write(record)
    figures |= {
        "image_bytes": [
            statistics.mean(len(r.images[0]) for r in group) for group in records.values()
        ],
        "samples": samples,
        "versions": {"torch": torch.__version__, "webdataset": webdataset.__version__},
        "scaled_decoding": scaled_differences(records[LARGE][:200], 224),
    }
    contenders = {
        what: (len(records[image]), reading_contenders(folder, tokenizer, image, size, records))
        for (image, size), what in READING.items()
    }
    contenders |= {
        what: (samples, runs) for what, runs in shard_contenders(folder, records[SMALL]).items()
    }
    for what, (count, runs) in contenders.items():
        figures[what] = processor_seconds(what, runs, count, rounds, folder / "w")
    write_synthetic_manifest(folder / "synthetic")
    command = [sys.executable, "-c", ORDER, folder / "synthetic"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures["order"] = json.loads(done.stdout)
    return figures


def reading_contenders(
    folder: Path, tokenizer: Tokenizer, image: tuple[int, int], size: int, records: dict
) -> dict[str, Callable[[], object]]:
    shards, count = folder / str(image[0]), len(records[image])
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    fast = webdataset.handle_extension("jpg", images.decode)
    return {
        OURS: partial(read_ours, shards, tokenizer, count, size),
        SCALED: partial(read_ours, shards, tokenizer, count, size, scaled=True),
        PILLOW: partial(read_webdataset, urls, "pilrgb", pillow_crop, size),
        FAST: partial(read_webdataset, urls, fast, images.augment, size),
    }


def shard_contenders(folder: Path, records: list[Record]) -> dict[str, dict[str, Callable]]:
    """Contenders in writing and indexing."""
    foreign = write_foreign(folder / "foreign", records)
    urls = sorted(str(path) for path in (folder / str(SMALL[0])).glob("*.tar"))
    return {
        "write": {
            OURS: lambda: write_ours(folder / "w", records),
            "webdataset.ShardWriter": lambda: write_webdataset(folder / "w", records),
            "webdataset.ShardWriter(mtime=0)": lambda: write_webdataset(
                folder / "w", records, mtime=0
            ),
        },
        "index, webdataset's": index_contenders(foreign),
        "index, plain": index_contenders(urls),
    }


def processor_seconds(
    what: str, runs: dict[str, Callable[[], object]], count: int, rounds: int, scratch: Path
) -> dict[str, list[float]]:
    """Processor seconds of each of `count` samples, for every contender in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            print(f"{what}, round {number}: {name} ...", file=sys.stderr)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            start = time.process_time()
            run()
            if number:
                seconds[name].append((time.process_time() - start) / count)
    return seconds


def write_ours(folder: Path, records: list[Record]) -> None:
    with ShardWriter(folder / "set", SHARD) as writer:
        for record in records:
            writer.write(record)


def write_webdataset(folder: Path, records: list[Record], **options) -> None:
    pattern = str(folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=SHARD, verbose=0, **options) as writer:
        for record in records:
            body = {"caption": record.caption, "source": record.source, "metadata": {}}
            writer.write({"__key__": record.key, "jpg": record.images[0], "json": body})


def write_foreign(folder: Path, records: list[Record]) -> list[str]:
    """Shards as webdataset.ShardWriter makes them unless told otherwise."""
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=SHARD, verbose=0) as writer:
        for record in records:
            body = {"caption": record.caption, "url": "https://example.org", "status": "success"}
            parts = {"jpg": record.images[0], "txt": record.caption, "json": body}
            writer.write({"__key__": record.key, **parts})
    return sorted(map(str, folder.glob("*.tar")))


def index_contenders(urls: list[str]) -> dict[str, Callable[[], object]]:
    return {
        OURS: lambda: [index_shard(url) for url in urls],
        "tarfile scan": lambda: [scan(url) for url in urls],
    }


def scan(url: str) -> int:
    with tarfile.open(url, "r:") as tar:
        return sum(member.isreg() for member in tar)


def write_synthetic_manifest(folder: Path) -> None:
    """Of 400 million samples in 40,000 shards that are not there."""
    folder.mkdir()
    digests = {"index_sha256": "0" * 64, "sums_sha256": "0" * 64}
    rows = [
        {"name": f"shard-{i:06d}.tar", "samples": 10_000, "bytes": 580_000_000} | digests
        for i in range(40_000)
    ]
    write_manifest(folder, rows)


def worker_memory(folder: Path, tokenizer: Tokenizer, samples: int) -> dict:
    """Unique memory of one data worker in MB, at up to 20 points of `samples` small images."""
    with ShardWriter(folder / "small", SHARD) as writer:
        for record in make_records(min(samples, 20_000), 96, 72):
            writer.write(record)
    before = {child.pid for child in psutil.Process().children()}
    batches = iter(open_ours(folder / "small", tokenizer, None, 224, workers=1))
    next(batches)
    (worker,) = [c for c in psutil.Process().children() if c.pid not in before]
    points: list[float] = []
    steps = memory_steps(samples)
    for step in range(1, steps[-1] + 1):
        next(batches)
        if step in steps:
            points.append(worker.memory_full_info().uss / 1e6)
            print(f"{step * BATCH:,} samples: {points[-1]:.1f} MB", file=sys.stderr)
    batches.close()
    return {"samples": steps[-1] * BATCH, "worker_megabytes": points}


def memory_steps(samples: int) -> list[int]:
    """After which batches the memory is measured: up to 20, evenly, the last one of them."""
    last = samples // BATCH
    return sorted({last * point // 20 for point in range(1, 21)} - {0})


def table(figures: dict) -> str:
    """The figures in Markdown."""
    sizes = zip((SMALL, LARGE), figures["image_bytes"], strict=True)
    lines = [
        f"{figures['samples']:,} images; "
        + "".join(f"{w} x {h}: {size / 1e3:.1f} kB; " for (w, h), size in sizes)
        + ", ".join(f"{name} {version}" for name, version in figures["versions"].items()),
        "",
        "| | contender | us per sample | samples/s on one core | times as long as this project |",
        "|---|---|---|---|---|",
    ]
    for what in CONTESTS:
        ours = figures[what][OURS]
        for name, seconds in figures[what].items():
            median = statistics.median(seconds)
            ratio = statistics.median(a / b for a, b in zip(seconds, ours, strict=True))
            lines.append(
                f"| {what} | {name} | {median * 1e6:.0f} | {1 / median:,.0f} | {ratio:.2f} |"
            )
    lines += ["", *scaled_lines(figures)]
    order = figures["order"]
    lines += [
        "",
        f"{order['samples']:,} samples: manifest read in {order['open_seconds']:.2f} s, order "
        f"ready in {order['ready_seconds']:.2f} s; seek {order['seek_milliseconds']:.2f} ms, the "
        f"first one of another epoch {order['other_epoch_milliseconds']:.0f} ms; "
        f"{order['peak_megabytes']:.0f} MB resident",
    ]
    if "memory" in figures:
        count, points = figures["memory"].values()
        middle = len(points) // 2
        first, second = map(statistics.median, (points[:middle], points[middle:]))
        lines.append(
            f"a worker over {count:,} samples: {first:.0f} MB in the first half, {second:.0f} MB "
            f"in the second (medians), {min(points):.0f} to {max(points):.0f} MB in all"
        )
    return "\n".join(lines)


def scaled_lines(figures: dict) -> list[str]:
    """What scaled decoding gains over webdataset with Pillow, and what it changes."""
    lines = []
    for what in READING.values():
        rounds = {name: figures[what][name] for name in (PILLOW, OURS, SCALED)}
        exact, scaled = (
            statistics.median(a / b for a, b in zip(rounds[PILLOW], rounds[name], strict=True))
            for name in (OURS, SCALED)
        )
        lines.append(f"{what}: {exact:.2f} x webdataset + Pillow, {scaled:.2f} x with scaling")
    found = figures["scaled_decoding"]
    for what, words in (("all", "as a whole"), ("resampling", "but for the crops' edges")):
        values = found[what]
        lines.append(
            f"scaled decoding {words}: pixels differ by {values['mean']:.2f} of 255 on average, "
            f"99 % by at most {values['percentile_99']:.0f}, all by at most {values['max']:.0f}; "
            f"brightness by {values['bias']:+.4f}"
        )
    centres = found["centres"]
    lines.append(
        f"crops' centres move by {centres['mean']:+.3f} pixels of the image on average, by "
        f"{centres['rms']:.2f} root mean square"
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
