"""Files of captions: in COCO's format, with `image` in Qwen-VL's, and Karpathy's splits.

Gold rows have the `answers` of an image, its captions, and its `files`, names to look for.
"""

from collections import defaultdict
from pathlib import Path, PurePosixPath

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.benchmark import Gold, Question
from megatron_owl2.evaluation.image_files import one_of_named
from megatron_owl2.evaluation.rows import (
    Id,
    Optional,
    identifier,
    list_of,
    object_of,
    place_of,
    read_rows,
    read_value,
    rows_by_id,
    text,
    with_ids_of,
    words,
)

REQUEST = "Provide a one-sentence caption for the provided image."
_SKILL = "caption"
_COCO_IMAGE = {"id": identifier, "file_name": Optional(words), "image": Optional(words)}
_KARPATHY_IMAGE = {
    "split": words,
    "filename": words,
    "filepath": Optional(words),  # of COCO
    "cocoid": Optional(identifier),
    "imgid": identifier,
    "sentences": list_of(object_of(raw=text)),
}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The same request for every image that has a caption."""
    return [
        Question(
            id=i,
            text=REQUEST,
            images=(one_of_named(path, *row["files"]),),
            skill=row["skill"],
            gold=row["answers"][0],
        )
        for i, row in gold.items()
    ]


def read_gold(path: Path) -> Gold:
    """All captions of each image by its id, of Karpathy's files those of the test split."""
    karpathy = read_value(path, "annotations") is None and read_value(path, "dataset") is not None
    return read_karpathy_test(path) if karpathy else read_coco(path)


def read_coco(path: Path) -> Gold:
    """All captions of each image by its id, in COCO's format.

    Raises TaskError for captions of images that are not listed, or listed with several files.
    """
    captions = defaultdict(list)
    for row in read_rows(path, {"image_id": identifier, "caption": words}, "annotations"):
        captions[row["image_id"]].append(row["caption"])
    names = _coco_names(path, captions)
    return {
        i: {"answers": texts, "skill": _SKILL, "files": _with_last_part(names[i])}
        for i, texts in captions.items()
    }


def _coco_names(path: Path, captions: dict[Id, list[str]]) -> dict[Id, str]:
    names: dict[Id, str] = {}
    for row in read_rows(path, _COCO_IMAGE, "images"):
        name = row["file_name"] or row["image"]
        if name is None:
            raise TaskError(
                f"{path}: image {row['id']!r} has neither 'file_name' nor 'image'{place_of(row)}"
            )
        if names.setdefault(row["id"], name) != name:
            raise TaskError(
                f"{path}: image {row['id']!r} is both {names[row['id']]} and {name}{place_of(row)}"
            )
    names = with_ids_of(captions, names)
    unknown = [i for i in captions if i not in names]
    if unknown:
        raise TaskError(
            f"{path}: {len(unknown)} images have captions but are not listed under 'images', such "
            f"as {unknown[0]!r}"
        )
    return names


def read_karpathy_test(path: Path) -> Gold:
    """The captions of the images of Karpathy's test split, by COCO's id or else the file's own."""
    rows = [
        row | {"id": row["imgid"] if row["cocoid"] is None else row["cocoid"]}
        for row in read_rows(path, _KARPATHY_IMAGE, "images")
        if row["split"] == "test"
    ]
    gold = {}
    for i, row in rows_by_id(path, rows, "id").items():
        folder = f"{row['filepath']}/" if row["filepath"] else ""
        gold[i] = {
            "answers": [sentence["raw"] for sentence in row["sentences"]],
            "skill": _SKILL,
            "files": list(dict.fromkeys([f"{folder}{row['filename']}", row["filename"]])),
        }
    return gold


def _with_last_part(name: str) -> list[str]:
    """A name, and the file's alone, as some files name where their makers had the images."""
    return list(dict.fromkeys([name, PurePosixPath(name).name or name]))
