"""Statistics of a corpus, in counts that add up over its splits."""

import builtins  # a field of Statistics is named bytes
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.corpus_files import UnreadFile, count_unread, describe_unread
from data_prep.filters import Filters, ImageStats, score_title
from data_prep.splits import Skipped
from megatron_owl2.errors import PreprocessError

_EXAMPLES = 5  # kept for each reason to skip
_LISTED = 10_000  # samples of a reason that are listed if something is wrong with them
_HALF = 20  # bars on each side of a score's limit
_KIB = 1024
_HISTOGRAMS = {
    "smaller side": ("pixels", [2**k * q // 4 for k in range(5, 12) for q in range(4, 8)] + [4096]),
    "aspect ratio": (
        "longer : shorter",
        [1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2, 2.25, 2.5, 3, 4, 6, 10],
    ),
    "text length": (
        "characters",
        [5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 125, 150, 200, 300, 500, 1000, 2000, 5000],
    ),
    "image bytes": ("bytes", [_KIB * 2**k for k in range(15)]),
}


class StatisticsBuilder:
    """Counts of one split or of several: skipped samples by reason with examples and, where
    something is wrong with them, a list (bounded by _LISTED), and histograms of what was read (as
    found) and kept (as stored). A histogram with k edges has k + 1 counts; both ends are open."""

    def __init__(self, filters: Filters):
        self.edges = histogram_edges(filters)
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.faults: dict[str, list[str]] = {}
        self.columns: set[str] = set()
        self.histograms = {
            kind: {name: [0] * (len(edges) + 1) for name, (_, edges) in self.edges.items()}
            for kind in ("read", "kept")
        }

    def skip(self, skipped: Skipped) -> None:
        """Count of one more sample that was left out."""
        self.skipped[skipped.reason] += 1
        _keep(self.examples, skipped.reason, [skipped.detail], _EXAMPLES)
        if not skipped.expected:
            _keep(self.faults, skipped.reason, [skipped.detail], _LISTED)

    def count(self, kind: str, stats: ImageStats) -> None:
        """Count of one more record in the histograms of kind "read" or "kept"."""
        for name, value in stats.values:
            self.histograms[kind][name][bisect_right(self.edges[name][1], value)] += 1

    def to_json(self) -> dict[str, Any]:
        """JSON of the counts, for add()."""
        return {
            "skipped": self.skipped,
            "examples": self.examples,
            "faults": self.faults,
            "columns": sorted(self.columns),
            "histograms": self.histograms,
        }

    def add(self, counts: dict[str, Any]) -> None:
        """Sum with the counts of the next split."""
        self.skipped.update(counts["skipped"])
        self.columns.update(counts["columns"])
        for reason, details in counts["examples"].items():
            _keep(self.examples, reason, details, _EXAMPLES)
        for reason, details in counts.get("faults", {}).items():  # not in older states
            _keep(self.faults, reason, details, _LISTED)
        for kind, histograms in counts["histograms"].items():
            for name, more in histograms.items():
                total = self.histograms[kind][name]
                total[:] = map(sum, zip(total, more, strict=True))

    def reasons(self) -> list[str]:
        """Reasons to skip, the most frequent one first."""
        return sorted(self.skipped, key=lambda reason: (-self.skipped[reason], reason))

    def skipped_lines(self) -> bytes:
        """JSON lines {"reason", "detail"} of the samples that something is wrong with, and of
        examples of the others; the same bytes for any workers and partitions."""
        rows = (
            {"reason": reason, "detail": detail}
            for reason in self.reasons()
            for detail in self.faults.get(reason) or self.examples[reason]
        )
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()

    def check_scores(self, names: Iterable[str]) -> None:
        """Check of the names of scores; raises PreprocessError for one that no record has."""
        read = self.histograms["read"]
        for name in sorted(names) if any(read["text length"]) else ():
            if not any(read[score_title(name)]):
                raise PreprocessError(
                    f"no record has a score {name!r}; the columns that hold numbers are: "
                    f"{', '.join(sorted(self.columns)) or 'none'}"
                )


def _keep(known: dict[str, list[str]], reason: str, details: list[str], most: int) -> None:
    """Addition of the details that `most` of a reason leave room for."""
    kept = known.setdefault(reason, [])
    kept += details[: most - len(kept)]


def histogram_edges(filters: Filters) -> dict[str, tuple[str, list[float]]]:
    """Units and inner edges of all histograms; those of a score have its limit in the middle."""
    edges = dict(_HISTOGRAMS)
    for name in sorted(filters.score_names):
        limits = filters.min_score if name in filters.min_score else filters.max_score
        limit = limits[name]
        width = _round_width(abs(limit) / _HALF or 1 / _HALF)
        steps = (step * width for step in range(-_HALF, _HALF + 1))
        edges[score_title(name)] = ("", [float(f"{limit + step:.12g}") for step in steps])
    return edges


def _round_width(width: float) -> float:
    """Largest of 1, 2, 5, 10, 20, ... (and of their tenths) that is not above `width`."""
    power = 10.0 ** math.floor(math.log10(width))
    return max(step * power for step in (1, 2, 5) if step * power <= width * (1 + 1e-9))


@dataclass(frozen=True)
class Statistics:
    """Statistics of a finished data set: samples kept and their shards and bytes, samples skipped
    by reason, examples of each reason, histograms (unit, edges, read, kept), the number of samples
    that was asked for, if one was, and by reason the files of the input that were not read (their
    number, and examples). The names of the fields are the keys of report.json."""

    kept: int
    shards: int
    bytes: int
    asked: int | None
    skipped: dict[str, int]
    examples: dict[str, list[str]]
    histograms: dict[str, dict[str, Any]]
    unread: dict[str, dict[str, Any]] = field(default_factory=dict)  # not in older reports

    @classmethod
    def of(
        cls,
        builder: StatisticsBuilder,
        rows: list[dict],
        asked: int | None,
        unread: Sequence[UnreadFile] = (),
    ) -> "Statistics":
        """Statistics from the counts of all splits; the most frequent reason comes first."""
        histograms = {
            name: {
                "unit": unit,
                "edges": edges,
                "read": builder.histograms["read"][name],
                "kept": builder.histograms["kept"][name],
            }
            for name, (unit, edges) in builder.edges.items()
        }
        return cls(
            kept=sum(row["samples"] for row in rows),
            shards=len(rows),
            bytes=sum(row["bytes"] for row in rows),
            asked=asked,
            skipped={reason: builder.skipped[reason] for reason in builder.reasons()},
            examples={reason: builder.examples[reason] for reason in builder.reasons()},
            histograms=histograms,
            unread=count_unread(unread),
        )

    @classmethod
    def from_json(cls, data: builtins.bytes) -> "Statistics":
        """Statistics that to_json wrote."""
        return cls(**json.loads(data))

    def to_json(self) -> builtins.bytes:
        """JSON of all fields; the same bytes for any workers and partitions."""
        return json.dumps(vars(self), indent=1).encode() + b"\n"

    @property
    def read(self) -> int:
        """Number of samples that the corpus had."""
        return self.kept + sum(self.skipped.values())

    def __str__(self) -> str:
        lines = [f"kept {self.kept}, skipped {self.read - self.kept}"]
        if self.asked is not None and self.kept < self.asked:
            lines.append(f"  fewer than the {self.asked} that were asked for")
        for reason, count in self.skipped.items():
            lines.append(f"  {count} x {reason} (such as {self.examples[reason][0]})")
        lines += describe_unread(self.unread)
        # An example may be named by what no terminal can print.
        return "\n".join(lines).encode(errors="backslashreplace").decode()
