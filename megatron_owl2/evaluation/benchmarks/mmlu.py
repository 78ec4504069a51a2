"""MMLU (Hendrycks et al. 2021): multiple choice in 57 subjects, five examples before each question.

The examples are the first five of the subject's dev file and, like the question, worded as in
OpenCompass's generation task; a prompt here is one turn, so they stand above the question.
"""

from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import choices
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question, files_of
from megatron_owl2.evaluation.table_files import read_lines

FILES = "test/*_test.csv"
_EXAMPLES = 5
_LETTERS = "ABCD"
_ANSWER = "\nAnswer:"


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions below their subject's examples."""
    examples: dict[str, str] = {}
    for file in files_of(path, FILES):
        subject = _subject(file)
        dev = file.parent.parent / "dev" / f"{file.name.removesuffix('_test.csv')}_dev.csv"
        rows = _rows(dev)[:_EXAMPLES]
        if len(rows) < _EXAMPLES:
            raise TaskError(f"{dev} has {len(rows)} examples; {_EXAMPLES} are shown")
        examples[subject] = "".join(
            f"{_asked(subject, row)}{_ANSWER} {row['answer']}\n\n" for row in rows
        )
    return [
        Question(
            id=i,
            text=examples[row["skill"]] + _asked(row["skill"], row),
            images=(),
            skill=row["skill"],
            gold=row["answer"],
        )
        for i, row in gold.items()
    ]


def _subject(file: Path) -> str:
    return file.name.removesuffix("_test.csv").replace("_", " ")


def _asked(subject: str, row: Mapping) -> str:
    ask = "Answer the question by replying A, B, C or D."
    return "\n".join(
        [
            f"There is a single choice question about {subject}. {ask}",
            f"Question: {row['question']}",
            *choices.lettered(row["options"]),
        ]
    )


def read_gold(path: Path) -> Gold:
    """The rows of all subjects by subject and place in its file, as "world religions/0"."""
    return {
        f"{_subject(file)}/{n}": row | {"skill": _subject(file)}
        for file in files_of(path, FILES)
        for n, row in enumerate(_rows(file))
    }


def _rows(file: Path) -> list[dict]:
    """Question, options and answer of a file, which has no line of names."""
    rows = []
    for place, fields in read_lines(file):
        if len(fields) != len(_LETTERS) + 2 or fields[-1].strip() not in tuple(_LETTERS):
            raise TaskError(
                f"{file} is not in the format that the task reads: {place} must be a "
                "question, four options and A, B, C or D"
            )
        question, *options, answer = fields
        rows.append({"question": question, "options": options, "answer": answer.strip()})
    return rows


def score(predictions: Mapping, gold: Mapping, variant: str = "generation") -> dict:
    """Accuracy per subject, and their mean in which every subject counts alike.

    "generation" reads a letter from what the model says; other evaluations compare how likely the
    options are instead. `by_question` weights subjects by their size. Raises ScoreError.
    """
    return choices.score_choices(predictions, gold, choices.stated_letter, equal_skills=True)


BENCHMARK = Benchmark(
    about="MMLU, multiple choice in 57 subjects after five examples",
    file=FILES,
    gold_file=FILES,
    id_field="id",
    answer_field="answer",
    suffix=_ANSWER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=("generation",),
    columns=choices.COLUMNS,
    many_files=True,
    split="test",
)
