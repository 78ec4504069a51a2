"""Conversion of a published corpus into a data set of shards.

    owl2 preprocess-data --input PATH --format NAME --output DIR

Repeatable: a finished output is left alone, an interrupted one continued. Several machines share
the work: each runs --partition I/N into one folder, then one of them --merge; --deduplicate,
--hold-out and --sample N take both twice. slurm/preprocess.sh submits that chain. DIR/report.html
shows what came of the corpus.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_owl2.cli.command import Command
from megatron_owl2.cli.measure_lengths import (
    add_template,
    describe,
    measure,
    read_tokenizer,
    template_from,
)
from megatron_owl2.cli.options import count, number, score_limit
from megatron_owl2.errors import DataError, PreprocessError

if TYPE_CHECKING:
    from data_prep.job import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from data_prep.formats.registry import FORMATS
    from data_prep.reencode import DEFAULT_QUALITY

    parser.allow_abbrev = False
    add = parser.add_argument_group("input").add_argument
    add("--input", type=Path, required=True, help="folder or file to read")
    add("--format", choices=list(FORMATS), required=True)
    add("--images", type=Path, metavar="DIR", help="folder that image paths are relative to")
    add("--image-column", metavar="NAME", help="column of a table with the image's path")
    add("--caption-column", metavar="NAME", help="column of a table with the caption")

    add = parser.add_argument_group("which samples stay").add_argument
    add("--min-side", type=count, metavar="PIXELS", help="of the smaller side")
    add("--max-aspect", type=_ratio, metavar="RATIO", help="of the longer to the shorter side")
    add("--min-caption", type=count, metavar="CHARACTERS")
    add("--max-caption", type=count, metavar="CHARACTERS")
    for name, text in (("--min-score", "least"), ("--max-score", "largest")):
        add(
            name,
            type=score_limit,
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"{text} value of a column such as clip_similarity_vitb32; may be repeated",
        )
    add("--no-decode", action="store_true", help="trust images whose header can be read")
    add(
        "--deduplicate",
        choices=("image", "pair"),
        help="keep the first of samples with the same image, or the same image and text",
    )
    add(
        "--sample", type=_sample, metavar="N", help="keep N samples, or a fraction like 0.1 or 1e-3"
    )
    add(
        "--hold-out",
        type=count,
        default=0,
        metavar="N",
        help="leave out N samples, and all others of just the same images, for validation",
    )
    add("--only-held-out", action="store_true", help="keep just these, whatever --sample is")
    add("--seed", type=int, default=0, help="of the samples that are kept or held out")

    add = parser.add_argument_group("how images are stored").add_argument
    add("--max-side", type=count, metavar="PIXELS", help="make larger images smaller")
    add(
        "--jpeg-quality",
        type=_quality,
        metavar="Q",
        help=f"store every image as JPEG ({DEFAULT_QUALITY} for those that --max-side changes)",
    )

    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--output", type=Path, required=True, help="folder of the data set")
    add(
        "--shard-size",
        type=count,
        default=10_000,
        metavar="N",
        help="most samples of a shard; every split of the input begins a new one",
    )
    add("--workers", type=count, default=1, metavar="N", help="processes")
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="measure the samples for data.packing with it, as owl2 measure-lengths does",
    )
    add_template(output)
    share = parser.add_mutually_exclusive_group()
    share.add_argument(
        "--partition", type=_partition, default=(0, 1), metavar="I/N", help="0/N to (N-1)/N"
    )
    share.add_argument("--merge", action="store_true", help="do what all partitions must precede")
    share.add_argument("--plan", action="store_true", help="say how many splits and readings")


def run(options: argparse.Namespace) -> int:
    from data_prep.corpus_files import count_unread, describe_unread
    from data_prep.filters import Filters
    from data_prep.formats.registry import FORMATS
    from data_prep.job import preprocess
    from data_prep.reencode import Reencoding
    from data_prep.splits import ReadOptions
    from data_prep.worker import Settings

    if options.tokenizer is not None:
        read_tokenizer(options.tokenizer)  # what is wrong is refused before the work
        template_from(options)
    if options.only_held_out and not options.hold_out:
        raise PreprocessError("--only-held-out keeps what --hold-out N leaves out; give that too")
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
        options.hold_out,
        options.only_held_out,
    )
    plan = reader.plan(
        options.input,
        ReadOptions(
            options.images,
            options.shard_size,
            options.image_column,
            options.caption_column,
            options.output,
        ),
    )
    if options.plan:
        print(f"{len(plan.splits)} splits, {2 if settings.two_readings else 1} readings")
        for line in describe_unread(count_unread(plan.unread)):
            print(line)
        return 0
    arguments = {
        "format": options.format,
        "input": str(options.input.resolve()),
        "images": options.images and str(options.images.resolve()),
        "image_column": options.image_column,
        "caption_column": options.caption_column,
    }
    outcome = preprocess(
        plan,
        settings,
        options.output,
        arguments,
        options.workers,
        options.partition,
        options.merge,
    )
    print(f"{options.output}: {_summary(outcome, options.output)}")
    if options.tokenizer is not None and outcome.report is not None:
        _measure(options)
    return 0


def _measure(options: argparse.Namespace) -> None:
    """Measure the samples of a finished data set, unless it has these lengths."""
    from megatron_owl2.data.lengths import load_lengths
    from megatron_owl2.data.shards.dataset import ShardedDataset

    tokenizer, template = read_tokenizer(options.tokenizer), template_from(options)
    try:
        load_lengths(ShardedDataset(str(options.output)), tokenizer, template)
    except DataError:  # they were not measured, or are damaged
        print(describe(measure(options.output, tokenizer, template, options.workers)))


def _summary(outcome: "Outcome", output: Path) -> str:
    from data_prep.job import PAGE
    from data_prep.job_state import JobState

    if outcome.report is not None:
        state = "finished" if outcome.finished else "was finished already, nothing done"
        text = f"{state}; {outcome.report}\nlook at {output / PAGE}"
        listed = JobState(output).skipped
        if outcome.report.skipped and listed.exists():  # not in folders of earlier versions
            text += f"; what was left out is listed in {listed}"
        return text
    if outcome.selected:
        return "selected; now run the partitions again, then --merge"
    verb = "scanned" if outcome.scanned else "written"
    count = outcome.scanned + outcome.written
    return f"{count} splits {verb}; when all partitions are through, run --merge"


def _quality(text: str) -> int:
    value = number(text, int)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 100")
    return int(value)


def _ratio(text: str) -> float:
    value = number(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _sample(text: str) -> int | float:
    samples, fraction = number(text, int), number(text)
    if samples >= 1:
        return int(samples)
    if not 0 < fraction < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of samples, such as 1000, nor a fraction between 0 and "
            "1, such as 0.1 or 1e-3"
        )
    return fraction


def _partition(text: str) -> tuple[int, int]:
    index, partitions = (number(part, int) for part in (text.partition("/")[::2]))
    if not 0 <= index < partitions:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1")
    return int(index), int(partitions)


main = Command(
    verb="preprocess-data",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    error_code=1,
    interrupted="interrupted; finished splits are kept, start again to continue",
    sigterm_interrupts=True,
).main
