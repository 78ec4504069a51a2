"""List of a corpus's images that are worth a download, and a script for it.

    owl2 prepare-downloads --corpus NAME --input PATH --output DIR
    bash DIR/download.sh FOLDER
    owl2 preprocess-data --input FOLDER --format img2dataset --output SHARDS

DIR gets the list (urls-NNNNN.parquet), report.json (rows left out, by reason) and download.sh, the
exact img2dataset command. For COCO there is only the script, which fetches the official archives.
"""

import argparse
from pathlib import Path

from megatron_owl2.cli.command import Command
from megatron_owl2.cli.options import score_limit
from megatron_owl2.errors import PreprocessError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from data_prep.downloads.img2dataset_script import Options
    from data_prep.downloads.registry import CORPORA

    lines = []
    for corpus in CORPORA.values():
        lines.append(f"{corpus.name}: {corpus.about}")
        declared = corpus.scores | corpus.labels
        lines += [f"    {name}: {meaning}" for name, meaning in declared.items()]
    parser.epilog = "\n".join(lines)
    parser.add_argument("--corpus", choices=[*CORPORA, "coco"], required=True)
    parser.add_argument("--input", type=Path, help="file of the corpus as published, or folder")
    parser.add_argument("--output", type=Path, required=True, help="new folder of the list")
    rows = parser.add_argument_group("rows to list")
    rows.add_argument("--min-score", type=score_limit, action="append", metavar="NAME=VALUE")
    rows.add_argument("--max-score", type=score_limit, action="append", metavar="NAME=VALUE")
    rows.add_argument(
        "--only", type=_labels, action="append", metavar="NAME=LABEL[,LABEL]", help="labels to keep"
    )
    rows.add_argument("--min-side", type=int, metavar="PIXELS", help="of the smaller side")
    rows.add_argument("--max-aspect", type=float, metavar="RATIO", help="longer by shorter side")
    rows.add_argument("--min-caption", type=int, metavar="CHARACTERS")
    rows.add_argument("--max-caption", type=int, metavar="CHARACTERS")
    rows.add_argument("--sample", type=int, metavar="N", help="draw N of the rows that pass")
    rows.add_argument("--seed", type=int, default=1234, help="of the sample")
    images = parser.add_argument_group("images, as they are downloaded")
    defaults = Options()
    images.add_argument(
        "--image-size",
        type=int,
        default=defaults.image_size,
        metavar="PIXELS",
        help="smaller side of images that are bigger (default: %(default)s)",
    )
    images.add_argument("--quality", type=int, default=defaults.quality, help="of JPEG")
    images.add_argument(
        "--output-format", choices=["webdataset", "files", "parquet"], default="webdataset"
    )
    images.add_argument(
        "--shard-size",
        type=int,
        default=defaults.samples_per_shard,
        metavar="N",
        help="addresses of a shard",
    )


def run(options: argparse.Namespace) -> int:
    from data_prep.downloads import img2dataset_script as download
    from data_prep.downloads.coco_script import write_coco_script
    from data_prep.downloads.registry import CORPORA
    from data_prep.downloads.selection import Selection
    from data_prep.downloads.url_list import write_url_list

    if options.corpus == "coco":
        print(f"now: bash {write_coco_script(options.output)} FOLDER")
        return 0
    if options.input is None:
        raise PreprocessError(f"--input is missing; {CORPORA[options.corpus].about}")
    report, written = write_url_list(
        CORPORA[options.corpus],
        options.input,
        options.output,
        Selection(
            min_score=dict(options.min_score or ()),
            max_score=dict(options.max_score or ()),
            only=dict(options.only or ()),
            min_side=options.min_side,
            max_aspect=options.max_aspect,
            min_caption=options.min_caption,
            max_caption=options.max_caption,
            sample=options.sample,
            seed=options.seed,
        ),
        download.Options(
            options.image_size, options.quality, options.output_format, options.shard_size
        ),
    )
    print(f"{options.output}: {report}")
    if not written:
        print("was complete already, nothing done")
    print(f"now: bash {options.output / download.SCRIPT} FOLDER")
    return 0


def _labels(text: str) -> tuple[str, list[str]]:
    name, sign, labels = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=LABEL[,LABEL]")
    return name, labels.split(",")


main = Command(
    verb="prepare-downloads", help=__doc__, add_arguments=add_arguments, run=run, error_code=1
).main
