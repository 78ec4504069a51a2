"""Image captions in the format of COCO, scored by exact match with one of the references."""

from collections import defaultdict
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import named_image
from megatron_owl2.evaluation.rows import identifier, read_rows, with_ids_of, words
from megatron_owl2.evaluation.scoring import exact_match

REQUEST = "Provide a one-sentence caption for the provided image."


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The same request for every image that has a caption.

    Raises TaskError for captions of images that are not listed, or listed with several files.
    """
    names = {}
    for row in read_rows(path, {"id": identifier, "file_name": words}, "images"):
        name = names.setdefault(row["id"], row["file_name"])
        if name != row["file_name"]:
            raise TaskError(f"{path}: image {row['id']!r} is both {name} and {row['file_name']}")
    names = with_ids_of(gold, names)
    unknown = [i for i in gold if i not in names]
    if unknown:
        raise TaskError(
            f"{path}: {len(unknown)} images have captions but are not listed under 'images', such "
            f"as {unknown[0]!r}"
        )
    return [
        Question(
            id=i,
            text=REQUEST,
            images=(named_image(path, names[i]),),
            skill=row["skill"],
            gold=row["answers"][0],
        )
        for i, row in gold.items()
    ]


def read_gold(path: Path) -> Gold:
    """All captions of each image, by image id."""
    captions = defaultdict(list)
    for row in read_rows(path, {"image_id": identifier, "caption": words}, "annotations"):
        captions[row["image_id"]].append(row["caption"])
    return {i: {"answers": texts, "skill": "caption"} for i, texts in captions.items()}


BENCHMARK = Benchmark(
    about="captions in COCO's format, exact match with any of an image's",
    file="captions*.json",
    gold_file="captions*.json",
    id_field="image_id",
    answer_field="caption",
    suffix="",
    max_new_tokens=60,
    min_new_tokens=8,
    read_questions=read_questions,
    read_gold=read_gold,
    score=exact_match,
)
