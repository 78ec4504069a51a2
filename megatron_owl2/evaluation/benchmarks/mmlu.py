"""MMLU (Hendrycks et al. 2021): multiple choice in 57 subjects, five examples before each question.

The examples are the first five of the subject's dev file and, like the question, worded as in
OpenCompass's generation task; a prompt here is one turn, so they stand above the question. The
variants that compare likelihoods are plain text without the model's template.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import choices, likelihood
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question, files_of
from megatron_owl2.evaluation.table_files import read_lines

FILES = "test/*_test.csv"
_EXAMPLES = 5
_LETTERS = "ABCD"
_ANSWER = "\nAnswer:"


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions below their subject's examples."""
    shown = {
        subject: "".join(f"{_asked(subject, row)}{_ANSWER} {row['answer']}\n\n" for row in rows)
        for subject, rows in _examples(path).items()
    }
    return [
        Question(
            id=i,
            text=shown[row["skill"]] + _asked(row["skill"], row),
            images=(),
            skill=row["skill"],
            gold=row["answer"],
        )
        for i, row in gold.items()
    ]


def read_as_opencompass(path: Path, gold: Gold) -> list[Question]:
    """The questions as OpenCompass compares perplexities: of four whole texts, which begin with the
    subject after two spaces."""
    return _read_by_likelihood(
        path,
        gold,
        "about  ",
        lambda text: tuple(("", f"{text} {letter}") for letter in _LETTERS),
        likelihood.per_position,
    )


def read_as_lm_eval(path: Path, gold: Gold) -> list[Question]:
    """The questions as lm-eval compares them: " A" to " D" after one text."""
    return _read_by_likelihood(
        path,
        gold,
        "about ",
        lambda text: tuple((text, f" {letter}") for letter in _LETTERS),
        likelihood.total,
    )


def _read_by_likelihood(
    path: Path,
    gold: Gold,
    about: str,
    pairs: Callable[[str], tuple[tuple[str, str], ...]],
    measure: likelihood.Measure,
) -> list[Question]:
    before = {
        subject: f"The following are multiple choice questions (with answers) {about}{subject}.\n\n"
        + "".join(f"{_plain(row)}{_ANSWER} {row['answer']}\n\n" for row in rows)
        for subject, rows in _examples(path).items()
    }
    return [
        Question(
            id=i,
            text=_plain(row),
            images=(),
            skill=row["skill"],
            gold=row["answer"],
            candidates=likelihood.Candidates(
                pairs(f"{before[row['skill']]}{_plain(row)}{_ANSWER}"), measure
            ),
        )
        for i, row in gold.items()
    ]


def _examples(path: Path) -> dict[str, list[dict]]:
    """The first five rows of each subject's dev file; raises TaskError for a file with fewer."""
    examples = {}
    for file in files_of(path, FILES):
        dev = file.parent.parent / "dev" / f"{file.name.removesuffix('_test.csv')}_dev.csv"
        rows = _rows(dev)[:_EXAMPLES]
        if len(rows) < _EXAMPLES:
            raise TaskError(f"{dev} has {len(rows)} examples; {_EXAMPLES} are shown")
        examples[_subject(file)] = rows
    return examples


def _plain(row: Mapping) -> str:
    return "\n".join([row["question"].strip(), *choices.lettered(row["options"])])


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

    "generation" reads a letter from what the model says; "opencompass" and "lm_eval" compare how
    likely the options are. `by_question` weights subjects by their size, as "lm_eval" does in its
    overall accuracy. Raises ScoreError.
    """
    pick = choices.stated_letter if variant == "generation" else choices.whole_answer
    return choices.score_choices(predictions, gold, pick, equal_skills=variant != "lm_eval")


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
    variants=("generation", "opencompass", "lm_eval"),
    by_likelihood={"opencompass": read_as_opencompass, "lm_eval": read_as_lm_eval},
    columns=choices.COLUMNS,
    many_files=True,
    split="test",
)
