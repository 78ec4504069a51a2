"""Ratings by people, A (best) to D: blind sheets of several models' answers, and their tally."""

import base64
import csv
import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as PillowImage

from megatron_owl2.data import pillow_images
from megatron_owl2.errors import ScoreError, TaskError
from megatron_owl2.evaluation.question import Image, Question
from megatron_owl2.evaluation.raters import Raters
from megatron_owl2.evaluation.rows import (
    Id,
    Optional,
    flag,
    identifier,
    list_of,
    object_of,
    read_object,
    short,
    with_ids_of,
    words,
)
from megatron_owl2.evaluation.scoring import RATINGS, check_ids, count_ratings, group_by_skill
from megatron_owl2.evaluation.video_files import Video
from megatron_owl2.utils.files import write_atomically
from megatron_owl2.utils.html_page import render

SHEET, PAGE, KEY = "sheet.csv", "sheet.html", "key.json"
_TEMPLATE = Path(__file__).parent / "templates" / "rating_sheet.html"
_COLUMNS = ("item", "question", "answer", "rating")
_KEY_ROW = object_of(model=words, id=identifier, skills=list_of(words), lost=Optional(flag, False))
_SIDE = 512  # pixels of an image on the page


@dataclass(frozen=True)
class Item:
    """An answer to be rated, under a code that does not say whose it is; one that is `lost` was not
    kept by those who published it, so that nobody can rate it."""

    code: str
    question: Question
    model: str
    answer: str
    lost: bool = False


def shuffled_items(
    questions: Sequence[Question],
    predictions: Mapping[str, dict[Id, str]],
    seed: int,
    is_lost: Callable[[str], bool] = lambda answer: False,
) -> list[Item]:
    """All models' answers to the questions: the questions in a random order, and so the answers to
    each, but for the lost ones, which come last. The codes begin with a mark of this sheet. Raises
    ScoreError for a model without answers to some of the questions.
    """
    by_id = {question.id: question for question in questions}
    answers = {}
    for model, texts in predictions.items():
        answers[model] = with_ids_of(by_id, texts)
        try:
            check_ids(answers[model], by_id)
        except ScoreError as error:
            raise ScoreError(f"{model}: {error}") from None
    content = json.dumps([seed, [sorted(map(repr, a.items())) for a in answers.values()]])
    mark = hashlib.sha256(content.encode(errors="replace")).hexdigest()[:4]
    order = random.Random(seed)
    rows = []
    for i in order.sample(list(by_id), len(by_id)):
        rows += [(i, model) for model in order.sample(list(answers), len(answers))]
    rows.sort(key=lambda row: is_lost(answers[row[1]][row[0]]))
    return [
        Item(f"{mark}-{number:04d}", by_id[i], model, text, is_lost(text))
        for number, (i, model) in enumerate(rows, start=1)
        for text in [answers[model][i]]
    ]


def write_sheet(folder: Path, items: Sequence[Item]) -> None:
    """The sheet to fill in, a page to read with it, and the key to the models, for nobody who
    rates. Lost answers are in the key alone. Raises TaskError if the folder has one of the three,
    or for an image that cannot be read.
    """
    for name in (SHEET, KEY, PAGE):  # a sheet that was moved away is nothing without its key
        if (folder / name).exists():
            raise TaskError(
                f"{folder / name} exists, of a sheet that may be filled in; name another folder"
            )
    shown = [item for item in items if not item.lost]
    page = render(_TEMPLATE, questions=list(_page_rows(items)))
    folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(_COLUMNS)
    writer.writerows((i.code, _cell(i.question.text), _cell(i.answer), "") for i in shown)
    key = {
        item.code: {
            "model": item.model,
            "id": item.question.id,
            "skills": item.question.skill.split(", "),
            **({"lost": True} if item.lost else {}),
        }
        for item in items
    }
    write_atomically(folder / KEY, (json.dumps(key, indent=1) + "\n").encode())
    (folder / PAGE).write_bytes(page)
    # With a mark by which spreadsheet programs know UTF-8.
    (folder / SHEET).write_text(table.getvalue(), encoding="utf-8-sig", errors="replace")


def _page_rows(items: Sequence[Item]) -> Iterator[dict]:
    by_id = {item.question.id: item.question for item in items}
    answers = group_by_skill((str(item.question.id), item) for item in items if not item.lost)
    for group in answers.values():
        question = group[0].question
        shown = [image for image in question.images if not isinstance(image, Video)]
        yield {
            "text": question.text,
            "before": [one.text for one in _before(question, by_id)],
            "images": [_jpeg(image, question) for image in shown],
            "videos": [v.path.name for v in question.images if isinstance(v, Video)],
            "answers": [{"item": item.code, "text": item.answer} for item in group],
        }


def _before(question: Question, by_id: Mapping[Id, Question]) -> list[Question]:
    """The questions that one follows in a conversation."""
    before = by_id.get(question.follows) if question.follows is not None else None
    return [*_before(before, by_id), before] if before else []


def _jpeg(image: Image, question: Question) -> str:
    """A small JPEG of an image in base64."""
    try:
        data = image.read_bytes() if isinstance(image, Path) else image
        assert isinstance(data, bytes)
        small = PillowImage.fromarray(pillow_images.decode(data))
    except (OSError, pillow_images.UnusableImageError) as error:
        place = image if isinstance(image, Path) else "inside the question file"
        raise TaskError(f"{place}: {error} (the image of question {question.id!r})") from None
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def tally(key: Path, sheets: Sequence[Path], raters: Raters | None = None) -> dict:
    """How often each rating was given to each model, overall and per skill of the questions.

    Several sheets are those of several people, whose ratings are all counted. `unrated` counts
    rows that have none, and each model's `lost` the answers that no sheet has. With `raters` their
    published counts are added. Raises TaskError naming file and line of what is no rating of this
    key.
    """
    key_rows = read_object(key, _KEY_ROW)
    if not key_rows:
        raise TaskError(f"{key} holds no item")
    items = {code: row for code, row in key_rows.items() if not row["lost"]}
    lost = Counter(row["model"] for row in key_rows.values() if row["lost"])
    rated = [rating for sheet in sheets for rating in _read_sheet(sheet, items, key)]
    models: dict[str, list] = {row["model"]: [] for row in key_rows.values()}
    for code, rating in rated:
        models[items[code]["model"]].append((items[code], rating))
    table: dict[str, Any] = {
        "models": {
            model: _tally_row(found) | {"lost": lost[model]}
            for model, found in sorted(models.items())
        },
        "unrated": len(items) * len(sheets) - len(rated),
    }
    return table | ({"published": _published(raters)} if raters else {})


def _published(raters: Raters) -> dict:
    """The published counts in the form of the tally: per model and skill, without `overall`, as an
    answer may be of several skills."""
    names = dict.fromkeys(model for counts in raters.published.values() for model in counts)
    return {
        "source": raters.source,
        "models": {
            model: {
                "skills": {
                    skill: {**counts[model], "n": sum(counts[model].values())}
                    for skill, counts in raters.published.items()
                    if model in counts
                }
            }
            for model in names
        },
    }


def _tally_row(rated: Sequence[tuple[dict, str]]) -> dict:
    skills = group_by_skill((skill, rating) for row, rating in rated for skill in row["skills"])
    return {
        "overall": count_ratings([rating for _, rating in rated]),
        "skills": {skill: count_ratings(found) for skill, found in sorted(skills.items())},
    }


def _read_sheet(path: Path, items: Mapping[str, dict], key: Path) -> list[tuple[str, str]]:
    """(code, rating) of the rows that are rated."""
    rated: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, item, rating in _sheet_rows(path):
        if item not in items:
            raise TaskError(
                f"{path}, line {line}: there is no item {short(repr(item))} in {key}; is it the "
                "key of another sheet?"
            )
        if item in lines:
            raise TaskError(f"{path}, line {line}: item {item} stands in line {lines[item]}, too")
        lines[item] = line
        if rating and rating not in RATINGS:
            raise TaskError(
                f"{path}, line {line}: the rating {short(repr(rating))} is none of A, B, C and D"
            )
        if rating:
            rated[item] = rating
    return list(rated.items())


def _sheet_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, item and rating of the rows of a sheet, whose cells may hold line ends."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            places = [names.index(name) if name in names else -1 for name in ("item", "rating")]
            if -1 in places:
                raise TaskError(
                    f"{path}, line 1: it must name the columns item and rating, separated by "
                    f"commas; it is {short(repr(','.join(names)))}"
                )
            end = reader.line_num
            for fields in reader:
                start, end = end + 1, reader.line_num
                if not fields:
                    continue
                if len(fields) <= max(places):
                    raise TaskError(f"{path}, line {start}: it has {len(fields)} cells only")
                item, rating = (fields[place].strip() for place in places)
                yield start, item, rating.upper()
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TaskError(f"{path} is not text in UTF-8; save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise TaskError(f"{path}, line {reader.line_num}: {error}") from None


def _cell(text: str) -> str:
    """A text that no spreadsheet program takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
