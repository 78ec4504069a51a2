"""Page of answers, mistakes first: mistakes.html, without scripts, from templates/mistakes.html."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from megatron_owl2.data import images
from megatron_owl2.data.image_resize import resize
from megatron_owl2.errors import BadSampleError
from megatron_owl2.evaluation.benchmark import Benchmark
from megatron_owl2.evaluation.question import Image, Question
from megatron_owl2.evaluation.video_files import Video
from megatron_owl2.utils.files import write_atomically
from megatron_owl2.utils.html_page import render

MISTAKES = "mistakes.html"
_TEMPLATE = Path(__file__).with_name("templates") / MISTAKES
_SHOWN = {"wrong": 300, "right": 100, "not scored": 100}  # answers at most
_THUMBNAILS = 200  # on the page
_PER_ANSWER = 4  # of them
_SIDE = 224  # pixels
_QUALITY = 80
_TEXT = 2000  # characters
_RIGHT = 50.0  # percent; VQA accuracy has shades


def write_mistakes(
    path: Path,
    benchmark: Benchmark,
    questions: Sequence[Question],
    rows: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
) -> None:
    """Page at `path` with answers, rows of predictions.jsonl, and thumbnails of their images.

    It holds at most so many wrong and right answers, spread over the set, and so many images; what
    is left out is said on it.
    """
    verdicts: dict[str, list[int]] = {name: [] for name in _SHOWN}
    for place, row in enumerate(rows):
        verdicts[_verdict(row["score"])].append(place)
    chosen = {name: _spread(found, _SHOWN[name]) for name, found in verdicts.items()}
    places = [place for found in chosen.values() for place in found]
    skills = sorted({rows[place]["skill"] for place in places})
    thumbnails = _Thumbnails(blind=result["blind"])
    page = render(
        _TEMPLATE,
        task=result["task"],
        model=str(result.get("model", "")),
        counts=[
            {"name": name, "shown": len(chosen[name]), "all": len(found)}
            for name, found in verdicts.items()
            if found
        ],
        skills=skills,
        answers=[
            {
                "id": questions[place].id,
                "verdict": _verdict(rows[place]["score"]),
                "skill": rows[place]["skill"],
                "number": skills.index(rows[place]["skill"]),
                "score": rows[place]["score"],
                "question": _cut(rows[place]["question"]),
                "answer": _cut(rows[place][benchmark.answer_field]),
                "gold": None if rows[place]["gold"] is None else _cut(rows[place]["gold"]),
                "images": thumbnails.of(questions[place].images),
            }
            for place in places
        ],
        thumbnails=_THUMBNAILS,
        side=_SIDE,
        left_out=thumbnails.left_out,
    )
    write_atomically(path, page)


def _verdict(score: float | None) -> str:
    if score is None:
        return "not scored"
    return "right" if score >= _RIGHT else "wrong"


def _spread(places: list[int], most: int) -> list[int]:
    """At most so many places, evenly spread."""
    count = min(most, len(places))
    return [places[turn * len(places) // count] for turn in range(count)]


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"


class _Thumbnails:
    """Thumbnails in base64, until there are enough; `left_out` counts images after that."""

    def __init__(self, *, blind: bool):
        self._blind, self._made, self.left_out = blind, 0, 0

    def of(self, shown: Sequence[Image]) -> list[dict[str, str]]:
        """JPEGs of the first images of a question, or why there is none."""
        if self._blind:
            return [{"jpeg": "", "why": "shown black"}] if shown else []
        found = []
        for image in shown[:_PER_ANSWER]:
            if self._made == _THUMBNAILS:
                break
            self._made += 1
            found.append(_thumbnail(image))
        self.left_out += len(shown) - len(found)
        return found


def _thumbnail(image: Image) -> dict[str, str]:
    if isinstance(image, Video):  # decoding one takes seconds
        return {"jpeg": "", "why": f"video {image.path.name}"}
    try:
        pixels = images.decode(image if isinstance(image, bytes) else image.read_bytes())
    except (OSError, BadSampleError):
        return {"jpeg": "", "why": "no thumbnail"}
    scale = min(1.0, _SIDE / max(pixels.shape[1:]))
    height, width = (max(1, round(side * scale)) for side in pixels.shape[1:])
    rows = np.ascontiguousarray(resize(pixels, height, width).permute(1, 2, 0).numpy())
    jpeg = simplejpeg.encode_jpeg(rows, _QUALITY, "RGB", colorsubsampling="420")
    return {"jpeg": base64.b64encode(jpeg).decode(), "why": ""}
