"""AGIEval (Zhong et al. 2024): 21 sets of questions from exams, in English and Chinese, zero-shot.

Most want one option, three want all that are right, and two a number or formula.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question, files_of
from megatron_owl2.evaluation.math_answers import is_same, stated_answer
from megatron_owl2.evaluation.rows import Optional, list_of, place_of, read_rows, text
from megatron_owl2.evaluation.scoring import check_ids, grouped_table

FILES = "*.jsonl"
_LETTERS = "ABCDEFG"
_ENGLISH = {
    "aqua-rat",
    "gaokao-english",
    "logiqa-en",
    "lsat-ar",
    "lsat-lr",
    "lsat-rc",
    "sat-en",
    "sat-en-without-passage",
    "sat-math",
}
_SEVERAL = {"gaokao-physics", "jec-qa-ca", "jec-qa-kd"}
_CHINESE = _SEVERAL | {
    "gaokao-biology",
    "gaokao-chemistry",
    "gaokao-chinese",
    "gaokao-geography",
    "gaokao-history",
    "gaokao-mathqa",
    "logiqa-zh",
}
_FORMULAS = {"math": "en", "gaokao-mathcloze": "zh"}


def _label(value: Any, name: str) -> str:
    """A text, or the letters of a list together."""
    return "".join(list_of(text)(value, name)) if isinstance(value, list) else text(value, name)


_FIELDS = {
    "passage": Optional(text, ""),
    "question": text,
    "options": Optional(list_of(text, at_least=0), []),
    "label": Optional(_label),
    "answer": Optional(text),
}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions in the words of AGIEval's zero-shot setting."""
    return [Question(i, _asked(row), (), row["skill"], row["answer"]) for i, row in gold.items()]


def _asked(row: Mapping) -> str:
    name, passage, question = row["skill"], row["passage"], row["question"]
    if name in _FORMULAS:
        if _FORMULAS[name] == "en":
            return f"{passage}Q: {question}\nA: The answer is"
        return f"{passage}问题：{question}\n答案："
    options, count = " ".join(row["options"]), len(row["options"])
    if name in _ENGLISH:
        last = _LETTERS[4 if count == 1 else count - 1]  # one: a text that holds them all
        asked = f"{passage}Q: {question} Answer Choices: {options}\n"
        return f"{asked}A: Among A through {last}, the answer is"
    last = _LETTERS[3 if count == 1 else count - 1]
    return f"{passage}问题：{question} 选项：{options}\n答案：从A到{last}, 我们应选择"


def read_gold(path: Path) -> Gold:
    """The rows of all sets by set and place in its file, as "sat-math/0".

    Raises TaskError for a file that is none of the sets, and for rows without an answer or options.
    """
    gold = {}
    for file in files_of(path, FILES):
        name = file.stem
        if name not in _ENGLISH | _CHINESE | _FORMULAS.keys():
            raise TaskError(f"{file} is none of AGIEval's sets; take it out of the folder")
        for n, row in enumerate(read_rows(file, _FIELDS)):
            choice = name not in _FORMULAS
            answer = row["label"] or row["answer"]
            if choice and answer:
                answer = "".join(sorted({letter for letter in answer if letter in _LETTERS}))
            if not answer or (choice and not 1 <= len(row["options"]) <= len(_LETTERS)):
                raise TaskError(f"{file}: a row has no answer or no options{place_of(row)}")
            kept = {key: row[key] for key in ("passage", "question", "options")}
            gold[f"{name}/{n}"] = kept | {"answer": answer, "skill": name}
    return gold


def score(predictions: Mapping, gold: Mapping) -> dict:
    """Accuracy per set, and the sets' mean in which each counts alike.

    One option is the first capital letter from A to F; several are all of these letters; numbers
    and formulas are compared as MATH's are. `by_question` weights sets by their size. Raises
    ScoreError.
    """
    check_ids(predictions, gold)
    return grouped_table(
        predictions,
        gold,
        ("skill",),
        lambda row: row["answer"],
        lambda answer, row: float(_is_right(answer, row)),
        equal_skills=True,
    )


def _is_right(answer: str, row: Mapping) -> bool:
    if row["skill"] in _FORMULAS:
        return is_same(stated_answer(answer), row["answer"])
    letters = [letter for letter in answer if letter in "ABCDEF"]
    if row["skill"] in _SEVERAL:
        return "".join(sorted(set(letters))) == row["answer"]
    return letters[:1] == [row["answer"]]


BENCHMARK = Benchmark(
    about="AGIEval, 21 sets of questions from exams",
    file=FILES,
    gold_file=FILES,
    id_field="id",
    answer_field="answer",
    suffix="",  # a question ends with the beginning of its answer
    max_new_tokens=64,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    many_files=True,
    split="test",
)
