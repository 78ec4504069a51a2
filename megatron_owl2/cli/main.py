"""The console command `owl2 VERB ...`: the command lines of this project under one name."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from megatron_owl2.utils.suggest import did_you_mean

VERBS = (
    "train",
    "plan",
    "generate",
    "serve",
    "evaluate",
    "convert-from-hf",
    "convert-to-hf",
    "verify-checkpoint",
    "preprocess-data",
    "prepare-downloads",
    "build-mixture",
    "check-data",
    "index-data",
    "measure-lengths",
    "show-sample",
    "plot-run",
    "visualize-attention",
    "report",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns its exit code. Raises SystemExit with 2 if there is no such verb."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in VERBS:
        verb, *rest = arguments
        return module_of(verb).main(rest, f"owl2 {verb}")
    parser = argparse.ArgumentParser(
        prog="owl2",
        usage="owl2 VERB [options]",
        description="mPLUG-Owl2 on megatron-core: data, training, conversion and answers.",
        epilog=f"verbs:\n{_summaries()}\n\n`owl2 VERB --help` shows the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", help=argparse.SUPPRESS)
    verb = parser.parse_known_args(arguments)[0].verb
    parser.error(f"there is no verb '{verb}'; {did_you_mean(verb, VERBS)}")


def module_of(verb: str) -> ModuleType:
    """The module of a verb, whose `main(arguments, prog)` runs it."""
    return importlib.import_module(f"megatron_owl2.cli.{verb.replace('-', '_')}")


def _summaries() -> str:
    """A line for every verb: the first of its docstring."""
    width = max(map(len, VERBS))
    lines = ((verb, (module_of(verb).__doc__ or "").partition("\n")[0]) for verb in VERBS)
    return "\n".join(f"  {verb:<{width}}  {line}" for verb, line in lines)
