"""BIG-Bench Hard (Suzgun et al. 2023): 27 tasks of reasoning, asked without examples."""

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question, files_of
from megatron_owl2.evaluation.rows import read_rows, words
from megatron_owl2.evaluation.scoring import check_ids, grouped_table

FILES = "*.json"
# All other tasks want the letter of an option, which their targets have in brackets.
_FREE_FORM = {
    "boolean_expressions",
    "causal_judgement",
    "dyck_languages",
    "formal_fallacies",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "sports_understanding",
    "web_of_lies",
    "word_sorting",
}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions, with their options where they have any."""
    return [
        Question(i, f"Question: {row['question']}", (), row["skill"], row["answer"])
        for i, row in gold.items()
    ]


def read_gold(path: Path) -> Gold:
    """The examples of all tasks by task and place in its file, as "navigate/0"."""
    return {
        f"{file.stem}/{n}": {
            "question": row["input"],
            "answer": row["target"],
            "skill": file.stem,
            "is_choice": file.stem not in _FREE_FORM,
        }
        for file in files_of(path, FILES)
        for n, row in enumerate(read_rows(file, {"input": words, "target": words}, "examples"))
    }


def score(predictions: Mapping, gold: Mapping, variant: str = "opencompass") -> dict:
    """Exact match per task, and the tasks' mean in which each counts alike.

    "opencompass" takes what follows "answer is ": in tasks with options the first letter, also of
    the target, else the first line without its period or what is bold in it. The paper's rules are
    "direct", the answer as it is, and "cot", what follows "answer is " without its period.
    `by_question` weights tasks by their size. Raises ScoreError.
    """
    check_ids(predictions, gold)

    def accuracy(answer: str, row: Mapping) -> float:
        if variant == "direct":
            return float(answer.strip() == row["answer"])
        if variant == "cot":
            return float(_after_answer_is(answer) == row["answer"])
        if row["is_choice"]:
            return float(first_letter(answer) == first_letter(row["answer"]))
        return float(_bold(_after_answer_is(answer)) == row["answer"])

    return grouped_table(
        predictions, gold, ("skill",), lambda row: row["answer"], accuracy, equal_skills=True
    )


def first_letter(answer: str) -> str:
    """The first capital in brackets after "answer is ", else the first capital, else the text."""
    answer = _tail(answer)
    found = re.search(r"\(([A-Z])", answer) or re.search("([A-Z])", answer)
    return found[1] if found else answer


def _tail(answer: str) -> str:
    """What follows the first "answer is ", or all; and ends before a second."""
    pieces = answer.split("answer is ")
    return pieces[1].strip() if len(pieces) > 1 else answer


def _after_answer_is(answer: str) -> str:
    return _tail(answer).split("\n")[0].strip().removesuffix(".").strip()


def _bold(answer: str) -> str:
    found = re.search(r"\*\*(.*?)\*\*", answer)
    return found[1] if found else answer


BENCHMARK = Benchmark(
    about="BIG-Bench Hard, 27 tasks of reasoning",
    file=FILES,
    gold_file=FILES,
    id_field="id",
    answer_field="answer",
    suffix="\n You must give your final answer by starting with 'So the answer is'",
    max_new_tokens=512,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=("opencompass", "direct", "cot"),
    many_files=True,
    split="test",
)
