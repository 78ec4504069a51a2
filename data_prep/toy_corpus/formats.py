"""Writers of the embedded corpus in the formats that real data sets publish.

img2dataset (pairs), LLaVA (instructions), ShareGPT (text), COCO captions, VQAv2
and POPE (eval).
All bytes are a function of the arguments: no time stamps, no host names.
"""

import hashlib
import io
import itertools
import json
import random
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from data_prep.toy_corpus import language, texts, world

SHARD_SIZE = 10_000  # img2dataset's default
CAPTION_EVERY = 3  # every third instruction image also asks for a caption
TWO_EVERY = 8  # and every eighth comes, with the one before it, in a dialogue about two images
_INFO = {
    "year": 2025,
    "version": "1.0",
    "description": "Embedded corpus of shapes",
    "contributor": "data_prep/shapes.py",
    "url": "",
    "date_created": "",
}
_LICENSE = {"id": 1, "name": "Apache License 2.0", "url": ""}

RenderedScene = tuple[world.Scene, bytes]
Turns = Sequence[tuple[str, str]]


class AnswerRecord:
    """Record of everything written: all training text, the captions of each split, the answers of
    each skill."""

    def __init__(self):
        self.texts: list[str] = []
        self.captions: dict[str, list[str]] = defaultdict(list)
        self.answers: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))

    def add_questions(self, split: str, questions: Iterable[language.Question]) -> None:
        """Count of the answers of `questions` for `split`."""
        for question in questions:
            self.answers[split][question.skill][question.answer] += 1

    def add_dialogue(self, turns: Turns) -> None:
        """Record of a training dialogue's text in the conversation template."""
        self.texts.append(" ".join(f"USER: {q} ASSISTANT: {a}" for q, a in turns))

    def statistics(self) -> dict:
        """Counts: {split: {skill: {questions, answers (distinct), majority, majority_share}}}."""
        return {
            split: {
                skill: {
                    "questions": answers.total(),
                    "answers": len(answers),
                    "majority": min(answers, key=lambda answer: (-answers[answer], answer)),
                    "majority_share": round(max(answers.values()) / answers.total(), 4),
                }
                for skill, answers in sorted(skills.items())
            }
            for split, skills in self.answers.items()
        }


def write_pairs(
    folder: Path, rendered: Iterable[RenderedScene], seed: int, answer_record: AnswerRecord
) -> dict:
    """Writer of img2dataset's shards and stats; returns {image_mean, image_std} of the pixels.

    Both are lists of three floats on the scale 0 to 1. Durations and modification times are 0.
    """
    folder.mkdir(parents=True)
    rendered = iter(rendered)
    histogram = numpy.zeros(3 * 256, dtype=numpy.int64)
    for shard in itertools.count():
        samples = list(itertools.islice(rendered, SHARD_SIZE))
        if not samples:
            break
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, (scene, jpeg) in enumerate(samples):
                # Half are told in free order, as captions of the web are.
                caption = language.caption(scene)
                if i % 2:
                    rng = random.Random(f"{seed}/pairs/{SHARD_SIZE * shard + i}/caption")
                    caption = language.retelling(scene, rng)
                answer_record.texts.append(caption)
                answer_record.captions["pairs"].append(caption)
                _add_pair(tar, f"{shard:05d}{i:04d}", caption, jpeg)
                histogram += Image.open(io.BytesIO(jpeg)).histogram()
        stats: dict[str, Any] = {"count": len(samples), "successes": len(samples)}
        stats |= {"failed_to_download": 0, "failed_to_resize": 0}
        stats |= {"duration": 0.0, "start_time": 0.0, "end_time": 0.0}
        stats["status_dict"] = {"success": len(samples)}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))
    shares = histogram.reshape(3, 256) / histogram[:256].sum()
    levels = numpy.arange(256) / 255
    mean = shares @ levels
    deviation = (shares @ levels**2 - mean**2) ** 0.5
    return {"image_mean": mean.round(4).tolist(), "image_std": deviation.round(4).tolist()}


def _add_pair(tar: tarfile.TarFile, key: str, caption: str, jpeg: bytes) -> None:
    metadata = {
        "caption": caption,
        "url": f"shapes://pairs/{key}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": world.IMAGE_SIZE,
        "height": world.IMAGE_SIZE,
        "original_width": world.IMAGE_SIZE,
        "original_height": world.IMAGE_SIZE,
        "sha256": hashlib.sha256(jpeg).hexdigest(),
    }
    members = {
        "jpg": jpeg,
        "txt": caption.encode(),
        "json": json.dumps(metadata, indent=4).encode(),
    }
    for extension, data in members.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def write_instructions(
    folder: Path, rendered: Iterable[RenderedScene], seed: int, answer_record: AnswerRecord
) -> None:
    """Writer of LLaVA conversations and their images, named relative to the JSON files' folder."""
    (folder / "images").mkdir(parents=True)
    questions, captions, pairs = [], [], []
    before: tuple[world.Scene, str] | None = None
    for i, (scene, jpeg) in enumerate(rendered):
        record = {"id": f"{i:012d}", "image": f"images/{i:012d}.jpg"}
        (folder / record["image"]).write_bytes(jpeg)
        rng = random.Random(f"{seed}/instructions/{i}/questions")
        dialogue = language.dialogue(scene, rng)
        turns = language.with_hint(dialogue, rng)
        answer_record.add_questions("instructions", dialogue)
        answer_record.add_dialogue(turns)
        questions.append(record | _conversations(turns, "<image>\n"))
        answer_record.captions["instructions"].append(language.caption(scene))
        if i % CAPTION_EVERY == 0:
            turns = [(language.CAPTION_REQUEST, language.caption(scene))]
            answer_record.add_dialogue(turns)
            captions.append(record | _conversations(turns, "<image>\n"))
        if before is not None and i % TWO_EVERY == 0:
            images = [before[1], record["image"]]
            rng = random.Random(f"{seed}/instructions/{i}/two")
            dialogue = language.two_image_dialogue(before[0], scene, rng)
            answer_record.add_questions("two images", [question for _, question in dialogue])
            pairs.append(record | {"image": images} | _placed(dialogue))
        before = scene, record["image"]
    _write_json(folder / "llava_two_images.json", pairs)
    _write_json(folder / "llava_shapes.json", questions)
    _write_json(folder / "llava_captions.json", captions)


def write_texts(
    path: Path,
    number: int,
    shares: dict[str, int],
    seed: int,
    answer_record: AnswerRecord,
    tick: Callable[[], object],
) -> None:
    """Writer of `number` ShareGPT dialogues with `shares` of text skills.

    `tick` is called after each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(number):
        rng = random.Random(f"{seed}/text/{path.stem}/{i}")
        (skill,) = rng.choices(list(shares), list(shares.values()))
        dialogue = texts.text_dialogue(skill, rng)
        turns = language.with_hint(dialogue, rng) if skill != texts.RETELLING else _plain(dialogue)
        answer_record.add_questions(f"text/{path.stem}", dialogue)
        answer_record.add_dialogue(turns)
        records.append({"id": f"{path.stem}_{i}"} | _conversations(turns))
        tick()
    _write_json(path, records)


def _plain(dialogue: Sequence[language.Question]) -> Turns:
    return [(question.text, question.answer) for question in dialogue]


def write_eval(
    folder: Path, rendered: Iterable[RenderedScene], seed: int, answer_record: AnswerRecord
) -> None:
    """Writer of COCO captions, VQAv2 questions and POPE about the same images.

    Every image gets one question of each skill it can answer, for existence one with the answer
    yes and one with no. File names are the image id with twelve digits, as in COCO.
    """
    (folder / "images").mkdir(parents=True)
    split = f"eval/{folder.name}"
    images, captions, questions, annotations, pope = [], [], [], [], []
    for i, (scene, jpeg) in enumerate(rendered, start=1):
        name = f"{i:012d}.jpg"
        (folder / "images" / name).write_bytes(jpeg)
        image = {"id": i, "file_name": name, "height": world.IMAGE_SIZE, "width": world.IMAGE_SIZE}
        image |= {"license": 1, "coco_url": "", "flickr_url": "", "date_captured": ""}
        images.append(image)
        captions.append({"image_id": i, "id": i, "caption": language.caption(scene)})
        answer_record.captions[split].append(captions[-1]["caption"])

        rng = random.Random(f"{seed}/{split}/{i}/questions")
        candidates = language.candidate_questions(scene, rng)
        existence = candidates.pop("existence", [])[:2]
        for question in existence:
            row = {"question_id": len(pope) + 1, "image": name}
            pope.append(row | {"text": question.text, "label": question.answer})
        asked = [rng.choice(found) for found in candidates.values()]
        for n, question in enumerate(asked):
            row = {"image_id": i, "question_id": i * 1000 + n}
            questions.append(row | {"question": question.text})
            annotations.append(row | _annotation(question))
        answer_record.add_questions(split, [*asked, *existence])

    coco = {"info": _INFO, "licenses": [_LICENSE], "images": images, "annotations": captions}
    _write_json(folder / "captions_val.json", coco)
    vqa = {"info": _INFO, "license": _LICENSE, "data_type": "shapes", "data_subtype": folder.name}
    vqa["task_type"] = "Open-Ended"
    _write_json(folder / "questions.json", vqa | {"questions": questions})
    _write_json(folder / "annotations.json", vqa | {"annotations": annotations})
    lines = "".join(json.dumps(row) + "\n" for row in pope)
    (folder / "coco_pope_adversarial.json").write_text(lines)


def write_text_eval(path: Path, number: int, seed: int, answer_record: AnswerRecord) -> None:
    """Writer of ShareGPT dialogues of one question on `number` contexts; `skill` names the skill.

    Half of the contexts are scenes, which are asked one question of each skill, as images are.
    """
    path.parent.mkdir(parents=True)
    records = []
    for i in range(number):
        scene, *others = texts.EVALUATED_SKILLS
        skill = scene if i % 2 else others[i // 2 % len(others)]
        rng = random.Random(f"{seed}/eval/text/{i}")
        questions = texts.evaluation_questions(skill, rng)
        answer_record.add_questions("eval/text", questions)
        for n, question in enumerate(questions):
            row = {"id": f"text_{i}_{n}", "skill": question.skill}
            records.append(row | _conversations([(question.text, question.answer)]))
    _write_json(path, records)


def _annotation(question: language.Question) -> dict:
    """Fields of VQAv2 beside the ids: ten annotators who agree, in lower case as published."""
    text = question.answer.lower()
    answer = {"answer": text, "answer_confidence": "yes"}
    return {
        "question_type": question.skill,
        "answer_type": "number" if question.answer.isdigit() else "other",
        "multiple_choice_answer": text,
        "answers": [answer | {"answer_id": n} for n in range(1, 11)],
    }


def _conversations(turns: Turns, prefix: str = "") -> dict:
    """LLaVA's {"conversations": [{from, value}, ...]}; `prefix` goes before the first question."""
    messages = []
    for question, answer in turns:
        messages.append({"from": "human", "value": prefix + question})
        messages.append({"from": "gpt", "value": answer})
        prefix = ""
    return {"conversations": messages}


def _placed(dialogue: Sequence[tuple[int, language.Question]]) -> dict:
    """Conversations whose questions begin with so many images each."""
    messages = []
    for images, question in dialogue:
        messages.append({"from": "human", "value": "<image>\n" * images + question.text})
        messages.append({"from": "gpt", "value": question.answer})
    return {"conversations": messages}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
