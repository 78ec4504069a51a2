"""Curves of training runs from their metrics.jsonl, a column for every run.

owl2 plot-run RUN_DIR [RUN_DIR ...] --output curves.png
"""

import argparse
from pathlib import Path

from megatron_owl2.cli.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", required=True, type=Path, help="the PNG to write")


def run(options: argparse.Namespace) -> int:
    from megatron_owl2.plotting import curves

    curves.draw(options.output, options.runs)
    print(options.output)
    return 0


main = Command(verb="plot-run", help=__doc__, add_arguments=add_arguments, run=run).main
