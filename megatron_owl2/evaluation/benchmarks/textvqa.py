"""TextVQA (Singh et al. 2019): questions whose answer is written in the image.

The file is the published TextVQA_0.5.1_val.json, the images are <image_id>.jpg. That of the test
set has no answers. `textvqa_ocr` shows the tokens of an OCR system as well.
"""

from pathlib import Path

from megatron_owl2.evaluation.benchmark import SHORT_ANSWER, Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import named_image
from megatron_owl2.evaluation.rows import identifier, list_of, read_rows, rows_by_id, text, words
from megatron_owl2.evaluation.vqa_accuracy import VARIANTS, evalai_submission, most_common, score

_SKILL = "reading"
_QUESTION = {"question_id": identifier, "question": words, "image_id": words}
_ANSWERS = {"question_id": identifier, "answers": list_of(text, at_least=2)}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions of a file of TextVQA, which holds their gold too."""
    return [question(path, row, gold) for row in question_rows(path)]


def question_rows(path: Path) -> list[dict]:
    """Rows of a file with their checked `question_id`, `question` and `image_id`."""
    rows = read_rows(path, _QUESTION, "data")
    return list(rows_by_id(path, rows, "question_id").values())


def question(path: Path, row: dict, gold: Gold, more: str = "") -> Question:
    """The question of a row of the file `path`, with more text after it."""
    i = row["question_id"]
    return Question(
        id=i,
        text=row["question"] + more,
        images=(named_image(path, f"{row['image_id']}.jpg"),),
        skill=_SKILL,
        gold=gold[i]["majority"] if gold else None,
    )


def read_gold(path: Path) -> Gold:
    """The annotators' answers by question id."""
    rows = rows_by_id(path, read_rows(path, _ANSWERS, "data"), "question_id")
    return {
        i: {"answers": row["answers"], "skill": _SKILL, "majority": most_common(row["answers"])}
        for i, row in rows.items()
    }


BENCHMARK = Benchmark(
    about="TextVQA, questions about text in images",
    file="TextVQA_0.5.1_*.json",
    gold_file="TextVQA_0.5.1_*.json",
    id_field="question_id",
    answer_field="answer",
    suffix=SHORT_ANSWER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=VARIANTS,
    submission=evalai_submission("question_id"),
)
