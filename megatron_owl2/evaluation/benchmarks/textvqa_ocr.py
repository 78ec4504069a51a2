"""TextVQA with the tokens that an OCR system read in the image, as a line after the question.

The tokens are those of the published TextVQA_Rosetta_OCR_v0.2_val.json beside the questions. The
line and the line break before the request are LLaVA-1.5's; mPLUG-Owl2's own are not published.
"""

from dataclasses import replace
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.benchmark import Gold, Question
from megatron_owl2.evaluation.benchmarks import textvqa
from megatron_owl2.evaluation.rows import list_of, read_rows, rows_by_id, text, words
from megatron_owl2.utils.files import is_hidden

_TOKENS = {"image_id": words, "ocr_tokens": list_of(text, at_least=0)}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions of a file of TextVQA, each with the tokens of its image.

    Raises TaskError if there is no file of tokens for them, or none of some image's.
    """
    file = _tokens_beside(path)
    tokens = rows_by_id(file, read_rows(file, _TOKENS, "data"), "image_id")
    rows = textvqa.question_rows(path)
    if unread := [row["image_id"] for row in rows if row["image_id"] not in tokens]:
        raise TaskError(
            f"{file}: {len(unread)} questions of {path.name} are about images that have no "
            f"tokens, such as {unread[0]}"
        )
    return [
        textvqa.question(path, row, gold, _line(tokens[row["image_id"]]["ocr_tokens"]))
        for row in rows
    ]


def _line(tokens: list[str]) -> str:
    return f"\nReference OCR token: {', '.join(tokens)}"


def _tokens_beside(questions: Path) -> Path:
    """The tokens of the set that a question file's last word says, as val."""
    pattern = f"TextVQA_Rosetta_OCR_*_{questions.stem.rsplit('_', 1)[-1]}.json"
    found = [path for path in questions.parent.glob(pattern) if not is_hidden(path.name)]
    if len(found) != 1:
        raise TaskError(f"{questions.parent} must hold one file {pattern}; it has {len(found)}")
    return found[0]


BENCHMARK = replace(
    textvqa.BENCHMARK,
    about="TextVQA with a line of OCR tokens after the question",
    suffix="\nAnswer the question using a single word or phrase.",
    read_questions=read_questions,
)
