"""CIDEr-D (Vedantam et al. 2015) of captions that are lists of tokens, as pycocoevalcap's "CIDEr".

Published figures are of captions that Stanford's PTB tokeniser split, which needs Java;
`approximate_ptb` comes near to it and is no replacement where a figure is to be compared exactly.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_owl2.evaluation.rows import Id
from megatron_owl2.evaluation.scoring import group_by_skill

Tokens = Sequence[str]
Ngram = tuple[str, ...]

_LONGEST = 4  # tokens of an n-gram
_SIGMA = 6.0  # of the penalty for another length
_SCALE = 10.0


def cider_d(
    candidates: Mapping[Id, Tokens], references: Mapping[Id, Sequence[Tokens]]
) -> dict[Id, float]:
    """CIDEr-D of each image's candidate, from 0 to 10; a corpus has their mean.

    Both have the same ids. N-grams of 1 to 4 tokens are weighted by how few of the images have them
    in a reference, so a value depends on the whole set; of one image alone it is 0.
    """
    grams = {i: [_ngrams(tokens) for tokens in texts] for i, texts in references.items()}
    images_with = Counter(gram for texts in grams.values() for gram in set().union(*texts))
    weights = _Weights(images_with, math.log(len(references)) if references else 0.0)
    return {
        i: _against(weights.of(_ngrams(candidates[i])), [weights.of(text) for text in texts])
        for i, texts in grams.items()
    }


def cider_table(values: Mapping[Id, float], gold: Mapping[Id, Mapping]) -> dict:
    """The table of a score, per `skill` of gold, from CIDEr-D of each image: in percent."""
    skills = group_by_skill((row["skill"], values[i]) for i, row in gold.items())
    return {
        "overall": _mean(list(values.values())),
        "skills": {skill: _mean(found) for skill, found in skills.items()},
    }


def _mean(values: Sequence[float]) -> dict[str, float]:
    return {"cider_d": round(100 * sum(values) / len(values), 2), "n": len(values)}


def approximate_ptb(text: str) -> list[str]:
    """Lower-case tokens without punctuation, nearly those of Stanford's PTB tokeniser.

    Clitics stand alone (does n't, man 's), words keep hyphens, slashes and apostrophes inside,
    numbers their commas, abbreviations of single letters their periods, brackets are -lrb- and the
    like, as pycocoevalcap leaves them. Known differences: an apostrophe before a word ('n, '90s),
    feet and inches, fractions with a space, addresses, abbreviations other than a few.
    """
    found: list[str] = _TOKEN.findall(text.lower())
    kept = [_BRACKETS.get(token, token) for token in found if token not in _DROPPED]
    return [part for token in kept for part in _split_clitics(token)]


_DROPPED = frozenset("'`\"“”‘’.?!,:;-–—…")
_BRACKETS = {
    mark: f"-{name}-"
    for mark, name in zip("()[]{}", ("lrb", "rrb", "lsb", "rsb", "lcb", "rcb"), strict=True)
}
_TOKEN = re.compile(
    r"""
    \b(?:[^\W\d_]\.){2,}                              # a.m.
    | \b(?:mr|mrs|ms|dr|st|ave|vs|etc|jr|sr)\.(?=\s|$)
    | \w+ (?: [-./'’@] \w+ | (?<=\d) [,:] (?=\d) \w+ )*  # well-dressed, o'clock, 1,000
    | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(.+)(n['’]t|['’](?:s|re|ve|ll|d|m))")
_CONTRACTED = {"cannot": 3, "gonna": 3, "wanna": 3, "gotta": 3}  # letters before the cut


def _split_clitics(token: str) -> list[str]:
    if cut := _CONTRACTED.get(token):
        return [token[:cut], token[cut:]]
    found = _CLITIC.fullmatch(token)
    return [*_split_clitics(found[1]), found[2].replace("’", "'")] if found else [token]


def _ngrams(tokens: Tokens) -> Counter[Ngram]:
    return Counter(
        tuple(tokens[first : first + n])
        for n in range(1, _LONGEST + 1)
        for first in range(len(tokens) - n + 1)
    )


@dataclass(frozen=True)
class _Vector:
    """The weights of a text's n-grams by n, their norms, and the text's length."""

    weights: list[dict[Ngram, float]]
    norms: list[float]
    length: int


@dataclass(frozen=True)
class _Weights:
    """Term frequency times inverse document frequency, where an image is a document."""

    images_with: Counter[Ngram]
    log_images: float

    def of(self, counts: Counter[Ngram]) -> _Vector:
        weights: list[dict[Ngram, float]] = [{} for _ in range(_LONGEST)]
        for gram, count in counts.items():
            rarity = self.log_images - math.log(max(1, self.images_with[gram]))
            weights[len(gram) - 1][gram] = count * rarity
        norms = [math.hypot(*row.values()) for row in weights]
        # The published code counts bigrams where it means tokens.
        return _Vector(weights, norms, sum(n for gram, n in counts.items() if len(gram) == 2))


def _against(candidate: _Vector, references: Iterable[_Vector]) -> float:
    values = [_similarity(candidate, reference) for reference in references]
    return _SCALE * sum(values) / len(values)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """The mean over n of the cosine, in which a candidate's weight counts up to the reference's."""
    penalty = math.exp(-((candidate.length - reference.length) ** 2) / (2 * _SIGMA**2))
    total = 0.0
    for n in range(_LONGEST):
        theirs = reference.weights[n]
        common = sum(
            min(weight, theirs[gram]) * theirs[gram]
            for gram, weight in candidate.weights[n].items()
            if gram in theirs
        )
        norms = candidate.norms[n] * reference.norms[n]
        total += penalty * (common / norms if norms else common)
    return total / _LONGEST
