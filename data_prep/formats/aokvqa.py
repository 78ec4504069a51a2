"""A-OKVQA (Schwenk et al. 2022) as published: aokvqa_v1p0_train.json, a list of multiple-choice
questions, [{question_id, image_id, question, choices, correct_choice_idx, ...}].

Each question is asked several times with its choices in another order, as the paper's tuning data
have it (50,000 samples of 17,056 questions).
"""

from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from data_prep.formats.common.annotation_files import (
    Entries,
    published_file,
    read_annotations,
    unexpected,
)
from data_prep.formats.common.coco_images import COCO_FOLDERS, coco_names
from data_prep.formats.common.image_questions import Fault, identifier, text_of
from data_prep.formats.common.inputs import (
    SkipError,
    cut_rows,
    image_folders,
    images_folder,
    read_first_image,
    record_key,
    refuse_columns,
    shown,
    skipped,
)
from data_prep.formats.common.one_caption import key_of
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, ReadOptions, Skipped
from megatron_owl2.data.sampling.keyed_random import permutation
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record, Turn
from megatron_owl2.errors import BadSampleError

ORDERS = 3  # samples of a question
# With the apostrophe that mPLUG-Owl2's own prompts of multiple choice have.
LETTER_ANSWER = "\nAnswer with the option\u2019s letter from the given choices directly."
_FILE = "aokvqa_v1p0_train.json"
_FIELDS = ("question_id", "image_id", "question", "choices", "correct_choice_idx")

_Row = tuple[int, Any]  # number of the entry, and the entry or its fault


class AOkVqa:
    """Multiple-choice questions on images of COCO, each in ORDERS orders of its choices."""

    name = "aokvqa"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for as many questions as give `options.samples_per_split` samples.

        `source` is the file, or the folder that holds it. Raises PreprocessError if it is something
        else.
        """
        refuse_columns(options)
        path = published_file(source, _FILE)
        folders = image_folders(images_folder(path, options), COCO_FOLDERS)
        content, digest = read_annotations(path, _FIELDS)
        is_list = isinstance(content, list) and not isinstance(content, Entries)
        if not is_list or not any(isinstance(row, dict) for row in content):
            raise unexpected(path, f"A-OKVQA's questions, a list of {', '.join(_FIELDS)}", content)
        rows = _once(content)
        size = max(1, options.samples_per_split // ORDERS)
        identity = f"{digest} in {ORDERS} orders"
        return cut_rows(rows, size, path, identity, lambda some: (some, folders, path.name))

    def read(self, payload: tuple[list[_Row], tuple[Path, ...], str]) -> Iterator[Record | Skipped]:
        """Records of consecutive questions; the key joins the question's id and the number of the
        order. A question that cannot be used is counted once."""
        rows, folders, file = payload
        for number, row in rows:
            try:
                yield from _records(row, folders)
            except (SkipError, BadSampleError) as error:
                name = row.get("question_id") if isinstance(row, dict) else None
                named = "" if name is None else f", question {shown(name)}"
                yield skipped(error, f"{file}, entry {number}{named}")


def _once(content: list) -> list[_Row]:
    """Entries with their numbers; instead of one whose question came before, its fault."""
    known, rows = set(), []
    for number, row in enumerate(content):
        name = row.get("question_id") if isinstance(row, dict) else None
        again = name is not None and str(name) in known
        known.add(str(name))
        rows.append((number, Fault("question id occurs twice", shown(name)) if again else row))
    return rows


def _records(row: Any, folders: tuple[Path, ...]) -> list[Record]:
    """All samples of a question."""
    if isinstance(row, Fault):
        raise SkipError(*row)
    if not isinstance(row, dict):
        raise SkipError("entry is not an object with question_id, choices and so on", shown(row))
    question_id = identifier(row.get("question_id"), "question_id")
    image_id = identifier(row.get("image_id"), "image_id")
    question = text_of(row.get("question"), "question")
    choices, correct = _choices(row)
    image = read_first_image(folders, coco_names(image_id))
    records = []
    for number, order in enumerate(choice_orders(question_id, len(choices))):
        options = [f"\n{ascii_uppercase[n]}. {choices[i]}" for n, i in enumerate(order)]
        text = f"{IMAGE_PLACEHOLDER}{question}{''.join(options)}{LETTER_ANSWER}"
        metadata = {"image_id": image_id, "question_id": question_id}
        records.append(
            Record(
                record_key(f"{question_id}_{number}", metadata),
                images=(image,),
                turns=(Turn(text, ascii_uppercase[order.index(correct)]),),
                source=AOkVqa.name,
                metadata=metadata,
            )
        )
    return records


def choice_orders(question_id: str, count: int) -> list[list[int]]:
    """Orders of `count` choices, at most ORDERS: a permutation keyed by the question's id, and the
    same turned on by one place, by two and so on.

    All are different, the correct choice never has the same letter twice, and over many questions
    each letter is correct equally often.
    """
    order = permutation(count, key_of(question_id))
    return [np.roll(order, turn).tolist() for turn in range(min(ORDERS, count))]


def _choices(row: dict) -> tuple[list[str], int]:
    """Choices of a question and the index of the correct one; raises SkipError if unusable."""
    choices, correct = row.get("choices"), row.get("correct_choice_idx")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(ascii_uppercase):
        raise SkipError("choices are not a list of 2 to 26", shown(choices))
    texts = [text_of(choice, "choice") for choice in choices]
    if correct is None:
        raise SkipError("no correct_choice_idx, as in the test split")
    if type(correct) is not int or not 0 <= correct < len(texts):
        raise SkipError("correct_choice_idx is not that of a choice", shown(correct))
    if len(set(texts)) < len(texts):
        raise SkipError("choice occurs twice", shown(choices))
    return texts, correct


FORMATS: tuple[Format, ...] = (AOkVqa(),)
