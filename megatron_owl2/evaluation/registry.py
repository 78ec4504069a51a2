"""The registry of benchmarks: every module of `evaluation.benchmarks`, named as its file."""

import importlib
import pkgutil
from itertools import zip_longest

from megatron_owl2.evaluation import benchmarks
from megatron_owl2.evaluation.benchmark import Benchmark


def find_benchmarks() -> dict[str, Benchmark]:
    """{name: entry} in the order of the names; a benchmark is added by adding its file.

    Raises TypeError for a module without a `BENCHMARK`.
    """
    found = {}
    for module in sorted(pkgutil.iter_modules(benchmarks.__path__), key=lambda module: module.name):
        path = f"{benchmarks.__name__}.{module.name}"
        entry = getattr(importlib.import_module(path), "BENCHMARK", None)
        if not isinstance(entry, Benchmark):
            raise TypeError(f"{path} must define BENCHMARK, a Benchmark; found {entry!r}")
        found[module.name] = entry
    return found


def describe(name: str, benchmark: Benchmark, width: int = 0) -> str:
    """Lines for a help text, behind the name in a column of `width`: what is read, how it is asked,
    and the variants of its score."""
    files = dict.fromkeys((benchmark.file, benchmark.gold_file))
    lines = [
        benchmark.about,
        f"files: {', '.join(files)}",
        f"asked with: {benchmark.suffix.strip() or 'nothing after the question'}",
        f"new tokens: {benchmark.min_new_tokens} to {benchmark.max_new_tokens}",
    ]
    if benchmark.variants:
        default, *others = benchmark.variants
        lines.append(f"variants: {', '.join([f'{default} (default)', *others])}")
    return "\n".join(
        f"{head:<{width}} {line}" for head, line in zip_longest([name], lines, fillvalue="")
    )
