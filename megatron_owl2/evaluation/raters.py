"""Published ratings of a benchmark by people, to stand beside those of one's own raters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Counts = Mapping[str, int]  # how often each rating was given


@dataclass(frozen=True)
class Raters:
    """What is known of a benchmark that people rate.

    `published` are the counts of other models' ratings by skill and model, as `source` gives them.
    `skills` says in words what skills with short names are. `is_lost` tells the texts that stand in
    published files where an answer was not kept: nobody can rate them.
    """

    source: str
    published: Mapping[str, Mapping[str, Counts]]
    skills: Mapping[str, str]
    is_lost: Callable[[str], bool]
