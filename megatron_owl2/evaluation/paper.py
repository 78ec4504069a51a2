"""Published figures, to stand beside those of an evaluation: of mPLUG-Owl2 (arXiv 2311.04257), and
of both versions where a benchmark's authors evaluated them.

The paper contradicts itself in places; that is recorded in `NOTES` and not mended.
"""

from collections.abc import Mapping
from dataclasses import dataclass

NOTES = {
    "mmbench": "Table 2 has 64.5, as of the test split; Tables 8 and 10 have 65.4, which a caption "
    "calls dev and the text test.",
    "q_bench": "62.9 in Table 2, 62.6 in Table 8, 0.6294 in Table 12.",
    "mmhal": "2.177 without its last digit.",
    "pope_cut": "82.06 and 45.86 are 82.067 and 45.867 without their last digits.",
    "pope_random": "Of the 2,910 rows that the random file had; later versions have 3,000.",
    "mmlu": "Table 16 calls the split dev, which holds the five examples; test is asked.",
    "likelihood": "The paper takes the most likely answer, as OpenCompass does.",
    "opencompass": "The paper's prompts are known by its reference to OpenCompass only.",
    "gqa": 'The paper says "test-balanced", whose answers are not published.',
    "vizwiz": "Whether mPLUG-Owl2 was told when to say Unanswerable is not published.",
    "ocr": "With the tokens of an OCR system in the prompt.",
    "caption": "CIDEr of texts that Stanford's PTB tokeniser split.",
    "seed": "Images and videos.",
    "hallusionbench": "By the README of HallusionBench (CVPR 2024), judged by GPT-4 under its own "
    "prompt, of the 1,129 questions that the file has since November 2023.",
}


@dataclass(frozen=True)
class Figure:
    """A published figure: the value that `path` leads to in the scores of the task, None if it is
    not known here.

    `split` is the paper's; where the file names are splits of their own (`own_split`), only scores
    of that one are its counterpart, and only those of question files whose names match `files`, a
    regular expression, in any letter case. `judged` figures are a judge's, where there is another
    rule as well. `notes` are keys of NOTES; `model` is whose figure it is.
    """

    table: int | None
    task: str
    metric: str
    path: tuple[str, ...]
    value: float | None
    split: str
    notes: tuple[str, ...] = ()
    own_split: bool = False
    files: str = ""
    judged: bool = False
    model: str = "mPLUG-Owl2"


_ACCURACY = ("overall", "accuracy")


def _accuracy(
    table: int | None,
    task: str,
    value: float | None,
    split: str,
    *notes: str,
    metric: str = "accuracy",
) -> Figure:
    return Figure(table, task, metric, _ACCURACY, value, split, notes)


def _mmbench(table: int, value: float, split: str) -> Figure:
    # The paper's questions are the English ones of the first version.
    names = r"^(?!.*(_cn|_v11))"
    return Figure(table, "mmbench", "accuracy", _ACCURACY, value, split, ("mmbench",), files=names)


def _video_qa(task: str, exact: float, accuracy: float, score: float) -> list[Figure]:
    overall, of_score = ("overall", "accuracy"), ("overall", "score")
    return [
        Figure(4, task, "exact match", overall, exact, "test"),
        Figure(4, task, "GPT accuracy", overall, accuracy, "test", judged=True),
        Figure(4, task, "GPT score", of_score, score, "test", judged=True),
    ]


def _arc(name: str, value: float) -> Figure:
    path = ("skills", name, "accuracy")
    return Figure(3, "arc", f"{name} accuracy", path, value, "test", ("likelihood",))


def _pope(split: str, values: Mapping[str, float | None], *notes: str) -> list[Figure]:
    return [
        Figure(9, "pope", metric, ("overall", metric), value, split, notes, True, r"^(coco_)?pope_")
        for metric, value in values.items()
    ]


def _hallusionbench(model: str, values: Mapping[str, float]) -> list[Figure]:
    name, notes = r"^hallusionbench\.json$", ("hallusionbench",)
    return [
        Figure(
            table=None,
            task="hallusionbench",
            metric=metric,
            path=("overall", metric),
            value=value,
            split="",
            notes=notes,
            files=name,
            judged=True,
            model=model,
        )
        for metric, value in values.items()
    ]


_POPE = ("accuracy", "precision", "recall", "f1", "yes_ratio")
_OF_PAPER = (
    Figure(1, "coco_caption", "CIDEr", ("overall", "cider_d"), 137.3, "test", ("caption",)),
    Figure(1, "flickr30k", "CIDEr", ("overall", "cider_d"), 85.1, "test", ("caption",)),
    _accuracy(1, "vqav2", 79.4, "testdev", metric="VQA accuracy"),
    _accuracy(1, "okvqa", 57.7, "val", metric="VQA accuracy"),
    _accuracy(1, "gqa", 56.1, "test-balanced", "gqa", metric="exact match"),
    _accuracy(1, "vizwiz", 54.5, "testdev", "vizwiz", metric="VQA accuracy"),
    _accuracy(1, "textvqa", 54.3, "val", metric="VQA accuracy"),
    _accuracy(1, "textvqa_ocr", 58.2, "val", "ocr", metric="VQA accuracy"),
    _accuracy(1, "scienceqa", 68.7, "test"),
    Figure(2, "mme", "perception", ("overall", "perception"), 1450.19, "all"),
    _mmbench(2, 64.5, "test"),
    _mmbench(10, 65.4, "dev or test"),
    Figure(2, "mmvet", "score", ("overall", "score"), 36.2, "test"),
    _accuracy(2, "seed_bench", 57.8, "all", "seed"),
    _accuracy(12, "q_bench", 62.94, "test", "q_bench"),
    _accuracy(3, "mmlu", 53.4, "dev", "mmlu", "likelihood"),
    _accuracy(3, "bbh", 45.0, "test", "opencompass"),
    _accuracy(3, "agieval", 32.7, "test", "opencompass"),
    _arc("ARC-Challenge", 65.8),
    _arc("ARC-Easy", 79.9),
    *_video_qa("msrvtt_qa", 23.6, 46.7, 2.9),
    *_video_qa("msvd_qa", 42.4, 65.4, 3.5),
    *_video_qa("tgif_qa", 61.6, 67.1, 3.7),
    *_pope(
        "random",
        {"accuracy": 88.28, "precision": 94.34, "recall": 82.20, "f1": 87.85, "yes_ratio": 44.91},
        "pope_random",
    ),
    *_pope(
        "popular",
        {"accuracy": 86.20, "precision": 89.46, "recall": 82.06, "f1": 85.60, "yes_ratio": 45.86},
        "pope_cut",
    ),
    *_pope("adversarial", dict.fromkeys(_POPE) | {"f1": 83.80}),
    Figure(None, "mmhal_bench", "score", ("overall", "score"), 2.17, "test", ("mmhal",)),
    Figure(None, "mmhal_bench", "hallucinations", ("overall", "hallucinations"), 56.0, "test"),
)
_OF_BENCHMARKS = (
    # What yes or no in an answer says, without a judge, was not published.
    _accuracy(None, "hallusionbench", None, ""),
    *_hallusionbench(
        "mPLUG-Owl",
        {"accuracy": 43.93, "qAcc": 9.45, "fAcc": 10.40, "easy": 39.34, "hard": 29.77},
    ),
    *_hallusionbench(
        "mPLUG-Owl2",
        {"accuracy": 47.30, "qAcc": 13.85, "fAcc": 19.94, "easy": 44.84, "hard": 39.07},
    ),
)
FIGURES = _OF_PAPER + _OF_BENCHMARKS
PAPER_TASKS = tuple(dict.fromkeys(figure.task for figure in _OF_PAPER))
