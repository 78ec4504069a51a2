"""Turn a published corpus into a data set of shards.

    python tools/preprocess_data.py --input PATH --format NAME --output DIR

Repeatable: a finished output is left alone, an interrupted one continued. Several machines share
the work by --partition 0/N ... (N-1)/N into one folder; whichever ends last finishes the data set.
"""

import argparse
import sys
from pathlib import Path

from data_prep.formats import FORMATS
from megatron_owl2.preprocess.job import preprocess
from megatron_owl2.preprocess.parts import PreprocessError, ReadOptions


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="folder or JSON file to read")
    parser.add_argument("--format", choices=sorted(FORMATS), required=True)
    parser.add_argument("--images", type=Path, help="folder of the pictures (conversations)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes")
    parser.add_argument(
        "--partition", type=_partition, default=(0, 1), metavar="I/N", help="0/N to (N-1)/N"
    )
    parser.add_argument(
        "--shard-size", type=_positive, default=10_000, metavar="N", help="samples in a shard"
    )
    options = parser.parse_args(arguments)
    try:
        return _preprocess(options)
    except (PreprocessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _preprocess(options: argparse.Namespace) -> int:
    if not options.input.exists():
        raise PreprocessError(f"--input {options.input} does not exist")
    reader = FORMATS[options.format]
    parts = reader.plan(options.input, ReadOptions(options.images, options.shard_size))
    outcome = preprocess(
        parts,
        reader.read,
        options.output,
        arguments={
            "format": options.format,
            "input": str(options.input.resolve()),
            "images": options.images and str(options.images.resolve()),
        },
        samples_per_shard=options.shard_size,
        workers=options.workers,
        partition=options.partition,
    )
    if outcome.report is None:
        print(f"{options.output}: {outcome.written} parts written, {outcome.missing} parts missing")
        print("the data set is finished by the last partition to end")
    else:
        state = "finished" if outcome.written else "already complete, nothing to do"
        print(f"{options.output}: {state}; {outcome.report}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _partition(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not slash or not 0 <= int(index) < int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1")
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(main())
