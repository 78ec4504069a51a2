"""Conversion of a full-size model both ways: peak memory and time against a plain copy.

Makes a released-layout directory of random bf16 weights (8,197,859,328 parameters unless --config
says otherwise; 16.4 GB, and room for three times that in DIRECTORY), then runs the two tools as a
user would. In every round each conversion is timed next to a plain copy of the files it reads;
all start with these files out of the page cache and end when the result is on the disk. At the end
every tensor of the export is compared with the original.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from megatron_owl2.config.load import load_config
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.lazy_tensor import LazyTensor
from megatron_owl2.convert.mapping import constants
from megatron_owl2.convert.safetensors_io import TensorReader
from megatron_owl2.convert.sources import weight_shapes

TOOLS = Path(__file__).parent.parent
COPY = """
import os, shutil, sys
for source, copy in zip(sys.argv[1::2], sys.argv[2::2]):
    shutil.copyfile(source, copy)
    with open(copy, "rb+") as file:
        os.fsync(file.fileno())
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", metavar="DIRECTORY", help="scratch space; must not exist")
    parser.add_argument("--config", metavar="FILE", help="run configuration with another model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()

    scratch = Path(arguments.directory)
    if scratch.exists():
        parser.error(f"{scratch} exists already")
    config = load_config(arguments.config) if arguments.config else _full_size()
    scratch.mkdir(parents=True)
    try:
        figures = measure(scratch, config, arguments.rounds)
    finally:
        shutil.rmtree(scratch)
    print(table(figures))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1))
    return 0


def measure(scratch: Path, config: RunConfig, rounds: int) -> dict:
    """Seconds and bytes of every run, by direction; see the module."""
    source, checkpoint, export = (scratch / name for name in ("source", "checkpoint", "export"))
    parameters = _write_source(source, config)
    runs = {
        "HF to Megatron": (source, "convert_from_hf", "--owl2", checkpoint),
        "Megatron to HF": (checkpoint, "convert_to_hf", "--checkpoint", export),
    }
    figures = {"parameters": parameters, "torch": torch.__version__, "directions": {}}
    for _ in range(rounds):
        for direction, (given, tool, flag, result) in runs.items():
            shutil.rmtree(result, ignore_errors=True)
            command = [TOOLS / f"{tool}.py", flag, given, "--output", result]
            seconds, peak = _run(direction, given, command)
            copy_seconds, _ = _copy(given, scratch / "copy")
            found = figures["directions"].setdefault(
                direction, {"seconds": [], "copy_seconds": [], "peak_bytes": []}
            )
            found["seconds"].append(seconds)
            found["copy_seconds"].append(copy_seconds)
            found["peak_bytes"].append(peak)
    figures["bytes"] = sum(file.stat().st_size for file in source.iterdir())
    figures["different_tensors"] = _differences(source, export)
    return figures


def table(figures: dict) -> str:
    """The figures in Markdown: medians over the rounds, the largest peak."""
    size = f"{figures['parameters']:,} parameters, {figures['bytes'] / 1e9:.1f} GB"
    lines = [
        f"{size}; torch {figures['torch']}; {figures['different_tensors']} tensors of the export "
        "differ from the original",
        "",
        "| direction | seconds | plain copy | ratio | peak resident |",
        "|---|---|---|---|---|",
    ]
    for direction, found in figures["directions"].items():
        seconds, copy = (statistics.median(found[k]) for k in ("seconds", "copy_seconds"))
        pairs = zip(found["seconds"], found["copy_seconds"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        peak = max(found["peak_bytes"]) / 1e9
        lines.append(f"| {direction} | {seconds:.1f} | {copy:.1f} | {ratio:.2f} | {peak:.2f} GB |")
    return "\n".join(lines)


def _full_size() -> RunConfig:
    config = RunConfig()
    config.model.vision.image_size = 448  # as released
    return config


def _write_source(directory: Path, config: RunConfig) -> int:
    """A released-layout directory of random numbers; returns how many parameters it has."""
    shapes = weight_shapes(config)
    pool = torch.randn(max(map(math.prod, shapes.values())) + 8191, dtype=torch.bfloat16)

    def lazy(number: int, shape: tuple[int, ...]) -> LazyTensor:
        start = number * 61 % 8191  # another part of the pool for every tensor
        part = pool[start : start + math.prod(shape)].view(shape)
        return LazyTensor(shape, torch.bfloat16, lambda: part)

    tables = constants(config.model)
    for name in tables:
        del shapes[name]
    tensors = {name: lazy(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    tensors |= {name: LazyTensor.of(table) for name, table in tables.items()}
    print("making the source", file=sys.stderr)
    export_hf(tensors, config.model, directory, progress=True)
    return sum(map(math.prod, shapes.values()))


def _copy(given: Path, copy: Path) -> tuple[float, int]:
    copy.mkdir()
    pairs = [path for file in given.iterdir() for path in (file, copy / file.name)]
    try:
        return _run("plain copy", given, ["-c", COPY, *pairs])
    finally:
        shutil.rmtree(copy)


def _run(what: str, given: Path, arguments: list) -> tuple[float, int]:
    """Seconds and peak resident bytes of a Python process that reads the files of `given`."""
    os.sync()
    for file in given.iterdir():
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    print(f"{what} ...", file=sys.stderr)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, arguments)])
    peak = 0
    while process.poll() is None:
        peak = max(peak, _peak_resident(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{what} failed: {' '.join(map(str, arguments))}")
    return time.monotonic() - start, peak


def _peak_resident(process: int) -> int:
    """Bytes; the kernel's high-water mark of this program alone (that of wait4 starts with what
    its parent had)."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    kilobytes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(kilobytes[0]) * 1024 if kilobytes else 0


def _differences(source: Path, export: Path) -> int:
    original, found = TensorReader(source), TensorReader(export)
    names = original.names()
    changed = sum(not torch.equal(original[n], found[n]) for n in names & found.names())
    return changed + len(names ^ found.names())


if __name__ == "__main__":
    sys.exit(main())
