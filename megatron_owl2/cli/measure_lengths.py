"""Lengths of the samples of data sets, by which `data.packing` plans its rows.

    owl2 measure-lengths DIR... --tokenizer FILE [--template NAME] [--tokenization RULES]
                                             [--workers N]

Every DIR is read once, without decoding images, and gets a file `lengths.*.safetensors` for this
tokenizer, template and tokenization; others have files of their own. `owl2 preprocess-data
--tokenizer` does the same when it has finished a data set.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from megatron_owl2.cli.command import Command
from megatron_owl2.cli.options import count
from megatron_owl2.config.templates import (
    OWL2,
    TEMPLATES,
    Template,
    Tokenization,
    check_trainable,
    template_of,
)
from megatron_owl2.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.measure import Measured
    from megatron_owl2.data.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", metavar="DIR")
    parser.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece model")
    add_template(parser)
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="processes")


def add_template(parser: "argparse._ActionsContainer") -> None:
    """Arguments that name the template and its rules, as `template_from` reads them."""
    parser.add_argument(
        "--template", choices=list(TEMPLATES), default=OWL2.name, help="of conversations"
    )
    parser.add_argument(
        "--tokenization",
        choices=get_args(Tokenization),
        default=OWL2.tokenization,
        help="as model.tokenization",
    )


def template_from(options: argparse.Namespace) -> Template:
    """The template of these options; raises ConfigError if no sample is made by it."""
    template = template_of(options.template, options.tokenization)
    check_trainable(template)
    return template


def run(options: argparse.Namespace) -> int:
    """Returns 0; raises ConfigError for what is no tokenizer, a template that makes no samples, and
    for URLs, where it cannot write."""
    if remote := [name for name in options.directories if "://" in name]:
        raise ConfigError(
            f"{remote[0]} is not on a disk; measure a copy that is, and put the file "
            "lengths.*.safetensors beside the shards"
        )
    tokenizer, template = read_tokenizer(options.tokenizer), template_from(options)
    for directory in options.directories:
        print(describe(measure(Path(directory), tokenizer, template, options.workers)))
    return 0


def read_tokenizer(path: Path) -> "Tokenizer":
    """The tokenizer in a file; raises ConfigError for what is none."""
    from megatron_owl2.data.tokenizer import Tokenizer

    try:
        return Tokenizer(path)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from None


def measure(
    directory: Path, tokenizer: "Tokenizer", template: Template, workers: int
) -> "Measured":
    """The lengths of one data set."""
    from data_prep.measure import measure_lengths

    return measure_lengths(directory, tokenizer, template, workers)


def describe(measured: "Measured") -> str:
    """What was found, for people."""
    text, images = measured.lengths.text, measured.lengths.images
    bad = f"; {measured.bad:,} cannot be read, and training will leave them out"
    return (
        f"{measured.path}: {len(text):,} samples of {text.mean():.1f} ids of text (at most "
        f"{text.max():,}) and {images.mean():.2f} images (at most {images.max():,})"
        f"{bad if measured.bad else ''}"
    )


main = Command(
    verb="measure-lengths",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    interrupted="interrupted; start again to measure the rest",
).main
