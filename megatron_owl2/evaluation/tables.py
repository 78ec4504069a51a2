"""Scores as a text table for the terminal."""

from collections.abc import Sequence


def table(scores: dict, columns: Sequence[str] = ("accuracy", "majority", "n")) -> str:
    """A text table of a benchmark's score, in percent: a row per skill and one for all."""
    rows = scores["skills"] | {"all": scores["overall"]}
    width = max(map(len, rows))
    heads = [f"{name:>{5 if name == 'n' else 8}}" for name in columns]
    lines = ["  ".join([f"{'skill':<{width}}", *heads])]
    for name, row in rows.items():
        values = [
            _cell(row.get(column)).rjust(len(head))
            for column, head in zip(columns, heads, strict=True)
        ]
        lines.append("  ".join([f"{name:<{width}}", *values]))
    named = ("precision", "recall", "f1", "perception", "cognition")
    more = {k: v for k, v in scores["overall"].items() if k in named}
    if more:
        lines.append("  ".join(f"{name} {value:.2f}" for name, value in more.items()))
    if unreachable := scores["overall"].get("unreachable"):
        lines.append(
            f"{unreachable} questions cannot be answered under this rule, because it changes "
            "every answer but not their gold (capitals, articles, number words); see --variant"
        )
    if unclear := scores["overall"].get("unclear"):
        lines.append(f'{unclear} answers have no "yes" and count as "yes", as the rule has it')
    if note := scores["overall"].get("note"):
        lines.append(note)
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    """A number of the table; a count has no decimals, and what a row lacks is a dash."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"
