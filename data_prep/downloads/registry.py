"""Corpora of image addresses by name: the `CORPUS` of all modules in the folder `corpora`."""

import re

from data_prep.discovery import declared
from data_prep.downloads import corpora
from data_prep.downloads.corpus import Corpus


def find_corpora() -> dict[str, Corpus]:
    """Corpora by name, sorted; numbers in names count as such.

    Raises TypeError naming the module if it declares none or something else, or a name twice.
    """
    found: dict[str, Corpus] = {}
    for module, corpus in declared(corpora, "CORPUS"):
        if not isinstance(corpus, Corpus):
            raise TypeError(f"{module}: CORPUS is {corpus!r}, not a Corpus")
        if corpus.name in found:
            raise TypeError(f"{module}: a corpus {corpus.name!r} exists already")
        found[corpus.name] = corpus
    return {name: found[name] for name in sorted(found, key=_by_number)}


def _by_number(name: str) -> list[str | int]:
    """Sort key by which cc3m comes before cc12m."""
    return [int(text) if text.isdigit() else text for text in re.split(r"([0-9]+)", name)]


CORPORA = find_corpora()
