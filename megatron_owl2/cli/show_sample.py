"""Samples as the model gets them: text, image rows, and what is supervised.

owl2 show-sample --data DIR --tokenizer FILE [--index N ...] [--key KEY ...]
owl2 show-sample --config FILE [section.key=value ...] [--row N ...]

With --data samples of one data set; with --config alone rows of the run, with all that is packed
into them. Both together: samples of the data set as the run would make them. Supervised tokens are
green, or between « and » where the output is no terminal.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from megatron_owl2.cli.command import Command, UsageError
from megatron_owl2.cli.options import count
from megatron_owl2.config.templates import TEMPLATES, Tokenization, check_trainable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", help="data set: a folder or a URL")
    parser.add_argument("--config", metavar="FILE", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    chosen = parser.add_argument_group("what is shown")
    chosen.add_argument(
        "--index", type=int, nargs="+", metavar="N", help="of samples of --data; the first is 0"
    )
    chosen.add_argument("--key", nargs="+", help="of samples of --data, all of which are read")
    chosen.add_argument(
        "--row", type=int, nargs="+", metavar="N", help="of the run's rows; the first is 0"
    )
    chosen.add_argument("--ids", action="store_true", help="show the ids of the tokens, too")
    chosen.add_argument("--html", metavar="FILE", help="write a page with the images instead")
    model = parser.add_argument_group("in place of what --config says")
    model.add_argument("--tokenizer", metavar="FILE", help="the model's tokenizer.model")
    model.add_argument("--template", choices=TEMPLATES, help="of conversations")
    model.add_argument(
        "--tokenization", choices=get_args(Tokenization), help="as model.tokenization"
    )
    model.add_argument("--sequence-length", type=count, metavar="N", help="positions of a row")
    model.add_argument("--tokens-per-image", type=count, metavar="N", help="65, as released")


def run(options: argparse.Namespace) -> int:
    _check(options)
    from megatron_owl2.mcore.setup import setup

    setup()  # before batches import megatron-core
    from data_prep import sample_report, show_sample
    from megatron_owl2.data.shards.dataset import open_dataset
    from megatron_owl2.data.tokenizer import load_tokenizer

    config = _config(options)
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.decoder.vocab_size)
    if options.data is None:
        rows = show_sample.rows_of_run(config, tokenizer, options.row or [0])
    else:
        dataset = open_dataset(options.data, config.data.storage)
        indices = options.index or ([] if options.key else [0])
        rows = show_sample.samples_of_dataset(
            dataset, config, tokenizer, indices, options.key or []
        )
    if options.html is not None:
        sample_report.write_html(rows, Path(options.html), ids=options.ids)
        return 0
    for row in rows:
        print(sample_report.as_text(row, color=sys.stdout.isatty(), ids=options.ids))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not fit together."""
    if options.data is None and options.config is None:
        raise UsageError("give --data, --config, or both")
    if options.data is None and (options.index or options.key):
        raise UsageError("--index and --key are of a data set; name it with --data")
    if options.data is not None and options.row:
        raise UsageError("--row is of a run; leave out --data")
    if options.config is None and options.overrides:
        raise UsageError("section.key=value needs --config")
    if options.config is None and options.tokenizer is None:
        raise UsageError("give --tokenizer, or a --config that names it")


def _config(options: argparse.Namespace):
    """The configuration, or the default one, with the values of the options."""
    from megatron_owl2.config.fields import check_section
    from megatron_owl2.config.load import load_config
    from megatron_owl2.config.schema import RunConfig
    from megatron_owl2.config.validate_model import validate_model

    config = load_config(options.config, options.overrides) if options.config else RunConfig()
    config.data.tokenizer = options.tokenizer or config.data.tokenizer
    config.data.sequence_length = options.sequence_length or config.data.sequence_length
    config.model.template = options.template or config.model.template
    config.model.tokenization = options.tokenization or config.model.tokenization
    if options.tokens_per_image is not None:
        config.model.abstractor.num_queries = options.tokens_per_image - 1  # and vit_eos
    validate_model(config.model)
    check_trainable(config.model.conversation)
    check_section(config)
    return config


main = Command(
    verb="show-sample", help=__doc__, add_arguments=add_arguments, run=run, intermixed=True
).main
