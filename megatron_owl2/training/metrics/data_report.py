"""Report on the data of a finished run: what was seen of each source, what was left out and why."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_owl2.data import bad_samples
from megatron_owl2.training.metrics.accumulator import bad, seen, shortened
from megatron_owl2.utils.files import write_atomically
from megatron_owl2.utils.json_text import json_lines, parse_json

NAME = "data_report.json"
_SAMPLE = re.compile(r"sample ('.*?'|\".*?\") \(.*?\): ")  # names the sample in front of the reason
_MOST = 5  # reasons of a source in the text


def write_data_report(
    output: Path, sources: Sequence[dict], run_totals: Mapping[str, int], from_sample: int
) -> str:
    """Write RUN/data_report.json and return it as text.

    `sources` are those of the last phase, which began at row `from_sample`; `run_totals` are its
    counts.
    """
    reasons = _reasons(output, from_sample)
    rows = [
        {
            "path": source["path"],
            "samples": source["samples"],
            "seen": run_totals[seen(index)],
            "epochs": run_totals[seen(index)] / source["samples"],
            "shortened": run_totals[shortened(index)],
            "bad": run_totals[bad(index)],
            "reasons": dict(reasons.get(index, Counter()).most_common()),
        }
        for index, source in enumerate(sources)
    ]
    report = {"sources": rows}
    write_atomically(output / NAME, json.dumps(report, indent=1, ensure_ascii=False).encode())
    return describe(report)


def describe(report: dict) -> str:
    """The report as text."""
    lines = ["data of the run:"]
    for row in report["sources"]:
        lines.append(
            f"  {row['seen']:>11,} samples, {row['epochs']:.2f} epochs, {row['shortened']:,} "
            f"shortened, {row['bad']:,} bad  {row['path']}"
        )
        lines += [f"{count:>15,} x {reason}" for reason, count in [*row["reasons"].items()][:_MOST]]
    return "\n".join(lines)


def _reasons(output: Path, from_sample: int) -> dict[int, Counter[str]]:
    """How often each source had a bad sample for each reason."""
    found: dict[int, Counter[str]] = {}
    for path in bad_samples.paths(output):
        for _, line in json_lines(path.read_bytes()):
            row = parse_json(line)
            if row["slot"] >= from_sample:
                found.setdefault(row["source"], Counter())[_category(row)] += 1
    return found


def _category(row: dict) -> str:
    """The reason without the place and the name of the sample."""
    where = f"{row['dataset'].rstrip('/')}/{row['shard']} at byte {row['offset']}: "
    return _SAMPLE.sub("", row["reason"].removeprefix(where), count=1)
