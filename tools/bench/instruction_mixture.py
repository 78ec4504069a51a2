"""Simulated lengths of the paper's instruction mixture (its Table 14), drawn from published means.

The counts are the paper's. A sample has an image or none, and turns; a turn has a question, an
answer and the ids of the template around them. `SOURCES` names where every figure is from; what is
said to be assumed was published nowhere. Figures of ShareGPT's questions, VQAv2, GQA, the files of
LLaVA-Instruct and RefCOCO's words were looked up; the others are quoted from memory of their
source, and still to be compared with it. Texts are log-normal, the number of turns is one more than
a Poisson variable; both shapes are assumed. So are 1.3 ids a word and 4.3 characters an id, of
LLaMA's tokenizer on English.
"""

import math
from dataclasses import dataclass

import numpy as np

from megatron_owl2.data.lengths import SampleLengths

IDS_PER_WORD = 1.3
TEMPLATE = 9  # ids of a turn: `USER: `, ` ASSISTANT:` and EOS
# Ids that data_prep/formats adds to questions, counted by hand: the request for a word or a phrase,
# four choices, a box of four numbers.
SHORT, CHOICES, BOX = 12, 24, 25


@dataclass(frozen=True)
class Text:
    """Ids of a question or an answer: their mean, and the deviation of their logarithm."""

    mean: float
    sigma: float = 0.35

    def draw(self, chance: np.random.Generator, count: int) -> np.ndarray:
        """Lengths, int64 [count]; at least 1."""
        median = math.log(self.mean) - self.sigma**2 / 2
        ids = chance.lognormal(median, self.sigma, count).round().astype(np.int64)
        return np.maximum(ids, 1)


def words(mean: float, beside: int = 0) -> Text:
    """A text of so many words on average, and ids beside them."""
    return Text(IDS_PER_WORD * mean + beside)


def published(mean: float, deviation: float) -> Text:
    """A text of which mean and standard deviation were published in ids."""
    return Text(mean, math.sqrt(math.log(1 + (deviation / mean) ** 2)))


@dataclass(frozen=True)
class Source:
    """A corpus of the mixture: `samples` with `images` each and `turns` on average, or exactly as
    many. `figures` says where these are from."""

    corpus: str
    samples: int
    images: int
    turns: float
    question: Text
    answer: Text
    figures: str
    exactly: bool = False

    def draw(self, chance: np.random.Generator, samples: int) -> SampleLengths:
        """Lengths of so many samples."""
        turns = np.full(samples, round(self.turns))
        if not self.exactly:
            turns = 1 + chance.poisson(self.turns - 1, samples)
        total = int(turns.sum())
        ids = self.question.draw(chance, total) + self.answer.draw(chance, total) + TEMPLATE
        text = 1 + np.add.reduceat(ids, np.cumsum(turns) - turns)  # after BOS
        images = np.full(samples, self.images, np.int32)
        return SampleLengths(text.astype(np.int32), images)


SOURCES = (
    Source(
        "ShareGPT", 40_000, 0, 3.51, published(94.46, 626.39), published(348.45, 269.93),
        "WildChat (Zhao et al., 2024), table 1: turns, ids of LLaMA-2 with their deviations",
    ),
    Source(
        "SlimOrca", 518_000, 0, 1, Text(230, 0.8), Text(170, 0.8),
        "assumed; a system text and a question of FLAN, an answer of GPT-4",
    ),
    Source(
        "LLaVA-Instruct", 58_000, 1, 4.5, Text(14), Text(60, 0.6),
        "conversation_58k.json has 126 MB (LLaVA, docs/Data.md); turns, questions and a third of "
        "it as JSON assumed",
    ),
    Source(
        "LLaVA-Instruct", 23_000, 1, 1, Text(15), Text(127),
        "detail_23k.json has 20.5 MB (the same); questions and 280 bytes of JSON a sample assumed",
    ),
    Source(
        "LLaVA-Instruct", 77_000, 1, 1, Text(20), Text(155),
        "complex_reasoning_77k.json has 79.6 MB (the same); likewise",
    ),
    Source(
        "COCO captions", 82_000, 1, 1, words(9), words(10.5),
        "TextCaps (Sidorov et al., 2020): words of a caption; one a sample, on request, assumed",
    ),
    Source(
        "TextCaps", 22_000, 1, 1, words(9), words(12.4),
        "TextCaps (Sidorov et al., 2020): words of a caption; one a sample, on request, assumed",
    ),
    Source(
        "VQAv2", 83_000, 1, 443_757 / 82_783, words(6.2, SHORT), words(1.1),
        "VQA v2 (Goyal et al., 2017): questions and images of the training split; words assumed, "
        "after VQA (Antol et al., 2015): most questions have 4 to 10, 9 of 10 answers one",
    ),
    Source(
        "GQA", 72_000, 1, 943_000 / 72_140, words(8, SHORT), words(1.1),
        "GQA (Hudson and Manning, 2019): questions and images, balanced; words assumed",
    ),
    Source(
        "OK-VQA", 9_000, 1, 1, words(8.1, SHORT), words(1.3),
        "A-OKVQA (Schwenk et al., 2022), table 1: words",
    ),
    Source(
        "OCR-VQA", 80_000, 1, 4.83, words(6.46, SHORT), words(3.31),
        "OCR-VQA (Mishra et al., 2019): questions an image, words",
    ),
    Source(
        "A-OKVQA", 50_000, 1, 1, words(8.8, CHOICES + SHORT), words(1.3),
        "A-OKVQA (Schwenk et al., 2022), table 1: words; with four choices, assumed",
    ),
    Source(
        "RefCOCO", 30_000, 1, 4, words(11), words(3.5, BOX),
        "TensorFlow Datasets: words of an expression; four a sample as in data_prep/formats, "
        "words of a request assumed", exactly=True,
    ),
    Source(
        "Visual Genome", 86_000, 1, 10, words(11), words(5, BOX),
        "Visual Genome (Krishna et al., 2017): words of a region; ten a sample as in "
        "data_prep/formats, words of a request assumed", exactly=True,
    ),
)  # fmt: skip
SAMPLES = sum(source.samples for source in SOURCES)


def draw(samples: int = SAMPLES, seed: int = 0) -> list[SampleLengths]:
    """Lengths of so many samples of the mixture in its shares, in the order of SOURCES."""
    chance = np.random.default_rng(seed)
    return [s.draw(chance, max(1, round(samples * s.samples / SAMPLES))) for s in SOURCES]
