"""Turn a published corpus into a data set of shards.

    python tools/preprocess_data.py --input PATH --format NAME --output DIR

Repeatable: a finished output is left alone, an interrupted one continued. Several machines share
the work: each runs --partition I/N into one folder, then one of them --merge; --deduplicate and
--sample N take both twice. slurm/preprocess.sh submits that chain. DIR/report.html shows what came
of the corpus.
"""

import argparse
import signal
import sys
from pathlib import Path

from data_prep.arguments import score_limit
from data_prep.filters import Filters
from data_prep.formats.registry import FORMATS
from data_prep.job import PAGE, Outcome, preprocess
from data_prep.reencode import DEFAULT_QUALITY, Reencoding
from data_prep.splits import ReadOptions
from data_prep.worker import Settings
from megatron_owl2.errors import PreprocessError


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _preprocess(options)
    except (PreprocessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished parts are kept, start again to continue", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("input").add_argument
    add("--input", type=Path, required=True, help="folder or file to read")
    add("--format", choices=list(FORMATS), required=True)
    add("--images", type=Path, metavar="DIR", help="folder that picture paths are relative to")
    add("--image-column", metavar="NAME", help="column of a table with the picture's path")
    add("--caption-column", metavar="NAME", help="column of a table with the caption")

    add = parser.add_argument_group("which samples stay").add_argument
    add("--min-side", type=_positive, metavar="PIXELS", help="of the smaller side")
    add("--max-aspect", type=_ratio, metavar="RATIO", help="of the longer to the shorter side")
    add("--min-caption", type=_positive, metavar="CHARACTERS")
    add("--max-caption", type=_positive, metavar="CHARACTERS")
    for name, text in (("--min-score", "least"), ("--max-score", "largest")):
        add(
            name,
            type=score_limit,
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"{text} value of a column such as clip_similarity_vitb32; may be repeated",
        )
    add("--no-decode", action="store_true", help="trust pictures whose header can be read")
    add(
        "--deduplicate",
        choices=("image", "pair"),
        help="keep the first of samples with the same picture, or the same picture and text",
    )
    add("--sample", type=_sample, metavar="N", help="keep N samples, or a fraction like 0.1")
    add("--seed", type=int, default=0, help="of the sample")

    add = parser.add_argument_group("how pictures are stored").add_argument
    add("--max-side", type=_positive, metavar="PIXELS", help="make larger pictures smaller")
    add(
        "--jpeg-quality",
        type=_quality,
        metavar="Q",
        help=f"store every picture as JPEG ({DEFAULT_QUALITY} for those that --max-side changes)",
    )

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help="folder of the data set")
    add(
        "--shard-size",
        type=_positive,
        default=10_000,
        metavar="N",
        help="most samples of a shard; every part of the input begins a new one",
    )
    add("--workers", type=_positive, default=1, metavar="N", help="processes")
    share = parser.add_mutually_exclusive_group()
    share.add_argument(
        "--partition", type=_partition, default=(0, 1), metavar="I/N", help="0/N to (N-1)/N"
    )
    share.add_argument("--merge", action="store_true", help="do what all partitions must precede")
    share.add_argument("--plan", action="store_true", help="say how many parts and readings")
    return parser


def _preprocess(options: argparse.Namespace) -> int:
    if not options.input.exists():
        raise PreprocessError(f"--input {options.input} does not exist")
    reader = FORMATS[options.format]
    settings = Settings(
        reader.read,
        Filters(
            options.min_side,
            options.max_aspect,
            options.min_caption,
            options.max_caption,
            dict(options.min_score),
            dict(options.max_score),
            decode=not options.no_decode,
        ),
        Reencoding(options.max_side, options.jpeg_quality),
        options.deduplicate,
        options.sample,
        options.seed,
        options.shard_size,
    )
    parts = reader.plan(
        options.input,
        ReadOptions(
            options.images, options.shard_size, options.image_column, options.caption_column
        ),
    )
    if options.plan:
        print(f"{len(parts)} parts, {2 if settings.two_readings else 1} readings")
        return 0
    arguments = {
        "format": options.format,
        "input": str(options.input.resolve()),
        "images": options.images and str(options.images.resolve()),
        "image_column": options.image_column,
        "caption_column": options.caption_column,
    }
    outcome = preprocess(
        parts,
        settings,
        options.output,
        arguments,
        options.workers,
        options.partition,
        options.merge,
    )
    print(f"{options.output}: {_summary(outcome, options.output)}")
    return 0


def _summary(outcome: Outcome, output: Path) -> str:
    if outcome.report is not None:
        state = "finished" if outcome.finished else "was finished already, nothing done"
        return f"{state}; {outcome.report}\nlook at {output / PAGE}"
    if outcome.selected:
        return "selected; now run the partitions again, then --merge"
    verb = "scanned" if outcome.scanned else "written"
    count = outcome.scanned + outcome.written
    return f"{count} parts {verb}; when all partitions are through, run --merge"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _quality(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 100")
    return value


def _ratio(text: str) -> float:
    value = float(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _sample(text: str) -> int | float:
    value = float(text) if "." in text else int(text)
    if value <= 0 or (isinstance(value, float) and value >= 1):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of samples nor below 1")
    return value


def _partition(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not slash or not 0 <= int(index) < int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1")
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(main())
