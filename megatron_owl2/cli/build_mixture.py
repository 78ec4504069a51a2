"""Data of a recipe: lists of addresses, downloads, shards, sources of a run.

    owl2 build-mixture --recipe examples/mixture.yaml --folder DIR          # look
    owl2 build-mixture --recipe examples/mixture.yaml --folder DIR --run    # work

Looking shows how far every source is, what it lost by reason, and the commands of the next steps;
--run runs them. When all sources are ready DIR/config.yaml holds the mixture for `python -m
megatron_owl2.train --config`. examples/instructions.yaml is the recipe of instruction tuning.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_owl2.cli.command import Command
from megatron_owl2.errors import PreprocessError

if TYPE_CHECKING:
    from data_prep.downloads.mixture import Mixture, State


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the mixture")
    parser.add_argument("--run", action="store_true", help="run the steps instead of showing them")
    parser.add_argument(
        "--only", metavar="NAME", help="one source, so that machines share the work"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that write shards")


def run(options: argparse.Namespace) -> int:
    """Returns 0; raises PreprocessError if a step failed."""
    from data_prep.downloads.mixture import Mixture
    from data_prep.downloads.recipe import read_recipe
    from megatron_owl2.config.examples import locate

    recipe = locate(options.recipe)
    mixture = Mixture(read_recipe(recipe), options.folder)
    names = list(mixture.recipe.sources)
    if options.only is not None:
        if options.only not in names:
            raise PreprocessError(f"--only {options.only}: the sources are {', '.join(names)}")
        names = [options.only]
    failed = []
    if options.run:
        failed = [name for name in names if not _run(mixture, name, options.workers)]
    states = {name: mixture.state(name) for name in mixture.recipe.sources}
    print(_table(mixture, states))
    for name in names:
        print(f"{name}: {mixture.advice(name, states[name])}")
        for reason, count in mixture.dropped(name).items():
            print(f"    {count:,} x {reason}")
        step = mixture.next_step(name, states[name])
        if step is not None:
            print(f"    {shlex.join(mixture.steps(name, options.workers)[step])}")
    if failed:
        raise PreprocessError(f"not finished: {', '.join(failed)}")
    if all(state.ready for state in states.values()):
        print(f"the mixture is ready: {mixture.write_config(recipe)}")
    return 0


def _run(mixture: "Mixture", name: str, workers: int) -> bool:
    """Whether a source is ready after its steps."""
    state, missing = mixture.state(name), mixture.missing(name)
    of_list = mixture.recipe.sources[name].corpus is not None
    if state.ready and (missing or (of_list and not state.download_complete)):
        print(f"{name}: nothing is done, since it is ready and what it was made of is gone")
        return True
    if missing:
        print(f"{name}: {missing}", file=sys.stderr)
        return False
    for step, command in mixture.steps(name, workers).items():
        if step == "download":
            state = mixture.state(name)
            # Shards are of the images that were downloaded then; another download has others.
            if state.sharded is not None or state.download_complete:
                continue
        print(f"{name}, {step}: {shlex.join(command)}", flush=True)
        if subprocess.run(command).returncode != 0:
            print(f"{name}: the step '{step}' failed", file=sys.stderr)
            return False
    return True


def _table(mixture: "Mixture", states: "dict[str, State]") -> str:
    head = ["source", "listed", "downloaded", "sharded", "target"]
    head += ["held out"] if mixture.recipe.hold_out else []
    rows = [head]
    for name, source in mixture.recipe.sources.items():
        state = states[name]
        listed, downloaded = _number(state.listed), _number(state.downloaded)
        if source.corpus is None:
            listed = downloaded = "-"
        elif state.listed is not None and not state.download_complete:
            downloaded += " ({} of {} shards)".format(*state.download_shards)
        row = [name, listed, downloaded, _number(state.sharded), _number(source.target)]
        rows.append(row + ([_number(state.held_out)] if mixture.recipe.hold_out else []))
    sharded = sum(state.sharded or 0 for state in states.values())
    target = sum(source.target for source in mixture.recipe.sources.values())
    held_out = sum(state.held_out or 0 for state in states.values())
    rows.append(["total", "", "", *map(_number, (sharded, target, held_out))][: len(head)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _number(value: int | None) -> str:
    return "0" if value is None else f"{value:,}"


main = Command(
    verb="build-mixture", help=__doc__, add_arguments=add_arguments, run=run, error_code=1
).main
