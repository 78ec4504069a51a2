"""Data sets of questions about images, from excerpts with the structure of the published files."""

import json
from collections import Counter
from pathlib import Path

import pytest
from preprocess_run import records as stored
from preprocess_run import report, succeeded, tool
from read_corpus import collect, refused
from tiny_data import encoded, make_image

from data_prep.formats.aokvqa import LETTER_ANSWER, choice_orders
from data_prep.formats.common.image_questions import SHORT_ANSWER
from data_prep.formats.common.inputs import SkipError
from data_prep.formats.common.vqa_files import most_confident
from data_prep.formats.registry import FORMATS
from data_prep.splits import ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record, Turn

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Images as the data sets publish them, below one folder."""
    folder = tmp_path_factory.mktemp("images")
    names = [
        "coco/train2014/COCO_train2014_000000458752.jpg",
        "coco/train2014/COCO_train2014_000000262146.jpg",
        "coco/train2017/000000051606.jpg",
        "coco/train2017/000000299207.jpg",
        "gqa/images/2354786.jpg",
        "gqa/images/n161313.jpg",
        "ocr_vqa/images/761183272.jpg",
        "ocr_vqa/images/1421539365.png",
        "ocr_vqa/images/B00001.gif",
    ]
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".jpg": "JPEG", ".png": "PNG", ".gif": "GIF"}[path.suffix]
        path.write_bytes(encoded(make_image(seed), kind))
    return folder


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def answers(*pairs: tuple[str, str]) -> list[dict]:
    return [
        {"answer": answer, "answer_confidence": sure, "answer_id": number}
        for number, (answer, sure) in enumerate(pairs, start=1)
    ]


def question(number, image, text) -> dict:
    return {"image_id": image, "question": text, "question_id": number}


def annotation(number, image, *pairs, **changes) -> dict:
    return {
        "question_type": "what is this",
        "multiple_choice_answer": pairs[0][0] if pairs else "",
        "answers": answers(*pairs),
        "image_id": image,
        "answer_type": "other",
        "question_id": number,
    } | changes


def vqa(folder: Path, questions: list, annotations: list, name=QUESTIONS) -> Path:
    folder.mkdir(exist_ok=True)
    head = {"info": {"year": 2017}, "license": {"url": "http://x"}, "data_subtype": "train2014"}
    body = {"task_type": "Open-Ended", "data_type": "mscoco", "questions": questions}
    write(folder / name, head | body)
    beside = name.replace("OpenEnded_", "").replace("questions", "annotations")
    write(folder / beside, head | {"annotations": annotations, "data_type": "mscoco"})
    return folder


NET = [("net", "maybe"), ("net", "maybe"), ("net", "no"), ("netting", "yes"), ("netting", "yes")]


def excerpt(folder: Path) -> Path:
    """Two images that are there, one that is not, and an oddity of every kind."""
    questions = [
        question(458752000, 458752, "What is this photo taken looking through?"),
        question(262146000, 262146, "Is it snowing? ❄"),
        question("458752001", "458752", "What position is this man playing?"),
        question(458752002, 458752, "Is he a pro?"),  # without an annotation
        question(458752001, 458752, "Once more?"),
        question(262146001, 262146, "Of another image?"),
        question(262146002, 262146, "Who knows?"),
        question(262146003, 262146, " "),
        question(262146004, 262146, "How sure?"),
        question(999000, 999, "Where is the image?"),
        question(999001, 999, "And where is it now?"),
        question(9000, 9, "And of this one?"),
        {"question": "Of nothing?", "question_id": 7},
        "no question",
    ]
    sure = ("pitcher", "yes")
    annotations = [
        annotation(458752000, 458752, *NET),
        annotation("262146000", "000000262146", ("yes", "yes")),
        annotation(458752001, 458752, sure),
        annotation(458752001, 458752, ("catcher", "yes")),
        annotation(262146001, 458752, sure),
        annotation(262146002, 262146, ("", "yes"), (" ", "no")),
        annotation(262146003, 262146, sure),
        annotation(262146004, 262146, ("a", "certain")),
        annotation(262146005, 262146, sure),  # without a question
        annotation(999000, 999, sure),
        annotation(999001, 999, sure),
        annotation(9000, 9, sure),
    ]
    return vqa(folder, questions, annotations)


FAULTS = {
    "question without an annotation": 1,
    "annotation without a question": 1,
    "question id occurs twice": 2,
    "question and annotation are of different images": 1,
    "empty answer": 1,
    "empty question": 1,
    "answer_confidence is neither yes, maybe nor no": 1,
    "image file is missing": 2,
    "no image_id": 1,
    "entry is not an object with question_id and image_id": 1,
}


@pytest.mark.parametrize("given", ["", QUESTIONS])
@pytest.mark.parametrize("size", [1, 100])
def test_vqav2_merges_the_questions_of_an_image(images, tmp_path, given, size):
    source = excerpt(tmp_path / "vqa") / given
    records, skipped = collect("vqav2", source, images=images, samples_per_split=size)
    assert records[0] == Record(
        "458752",
        images=((images / "coco/train2014/COCO_train2014_000000458752.jpg").read_bytes(),),
        turns=(
            Turn("<|image|>What is this photo taken looking through?" + SHORT_ANSWER, "netting"),
            Turn("What position is this man playing?" + SHORT_ANSWER, "pitcher"),
        ),
        source="vqav2",
        metadata={"image_id": "458752", "question_ids": ["458752000", "458752001"]},
    )
    assert [r.key for r in records] == ["458752", "262146"]
    assert records[1].turns == (Turn(f"<|image|>Is it snowing? ❄{SHORT_ANSWER}", "yes"),)
    assert skipped == FAULTS


def test_every_question_left_out_is_named(images, tmp_path):
    format_ = FORMATS["vqav2"]
    (split,) = format_.plan(excerpt(tmp_path / "vqa"), ReadOptions(images)).splits
    found = [item.detail for item in format_.read(split.payload) if isinstance(item, Skipped)]
    assert f"{QUESTIONS}, image '458752', question '458752002'" in found
    assert f"{QUESTIONS}: {QUESTIONS}, questions[13]: 'no question'" in found
    assert f"{QUESTIONS}: {ANNOTATIONS}, annotations[3]: question '458752001'" in found
    missing = images / "COCO_train2014_000000000999.jpg"
    assert f"{QUESTIONS}, image '999' with 2 questions: {missing}" in found
    missing = images / "COCO_train2014_000000000009.jpg"
    assert f"{QUESTIONS}, image '9' with 1 question: {missing}" in found


def test_the_most_confident_answer():
    assert most_confident(answers(*NET), "net") == "netting"  # 4 against 2, although 3 said net
    two = [("b", "yes"), ("a", "maybe"), ("a", "maybe")]
    assert most_confident(answers(*two), "b") == "a"  # 2 each; two annotators against one
    same = [("b", "yes"), ("a", "yes")]
    assert [most_confident(answers(*same), given) for given in ("a", "b", "c")] == ["a", "b", "b"]
    assert most_confident(answers(("x", "no"), ("", "yes"), (" x", "no"), ("y", "no")), "") == "x"
    for broken in (
        None,
        [],
        ["x"],
        [{"answer": 3, "answer_confidence": "yes"}],
        answers(("a", [])),
    ):
        with pytest.raises(SkipError):
            most_confident(broken, "x")


def test_okvqa_takes_the_scored_answer_and_images_of_2017(images, tmp_path):
    row = annotation(516065, 51606, question_type="four", confidence=3)
    del row["multiple_choice_answer"]
    row["answers"] = [
        {"answer_id": n, "raw_answer": raw, "answer_confidence": "yes", "answer": answer}
        for n, (raw, answer) in enumerate([("ponytail", "pony tail"), ("pony tails", "pony tail")])
    ]
    text = "What is the hairstyle of the blond called?"
    name = "OpenEnded_mscoco_train2014_questions.json"
    source = vqa(tmp_path / "okvqa", [question(516065, 51606, text)], [row], name)
    (record,), skipped = collect("okvqa", source, images=images / "coco")
    assert record.turns == (Turn(f"<|image|>{text}{SHORT_ANSWER}", "pony tail"),)
    assert (record.key, record.source, skipped) == ("51606", "okvqa", {})


def gqa_row(image, text, answer, **changes) -> dict:
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": text,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": answer,
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": f"{answer}, it is.",
    } | changes


def test_gqa_as_published(images, tmp_path):
    rows = [
        ("02930152", gqa_row("2354786", "Is the sky dark?", "yes")),
        ("07333408", gqa_row("n161313", "What is on the white wall?", "pipe")),
        ("7333405", gqa_row(2354786, "Is the tall clock small or large?", "large")),
        ("02930152", gqa_row("2354786", "Is it dark again?", "no")),
        ("1", gqa_row("2354786", "Which ones?", ["a", "b"])),
        ("2", gqa_row("../n161313", "Out of the folder?", "yes")),
        ("3", gqa_row(None, "Of what?", "nothing")),
        ("4", []),
        ("5", {"answer": "no", "imageId": 2354786}),
    ]
    path = tmp_path / "train_balanced_questions.json"  # with an id twice, as no dictionary has it
    body = ", ".join(f'"{name}": {json.dumps(row)}' for name, row in rows)
    path.write_text(f"{{{body}}}")
    records, skipped = collect("gqa", tmp_path, images=images)
    assert [r.key for r in records] == ["2354786", "n161313"]
    assert records[0].turns == (
        Turn(f"<|image|>Is the sky dark?{SHORT_ANSWER}", "yes"),
        Turn(f"Is the tall clock small or large?{SHORT_ANSWER}", "large"),
    )
    assert records[0].metadata["question_ids"] == ["02930152", "7333405"]
    assert skipped == {
        "question id occurs twice": 1,
        "answer is not a text": 1,
        "image path leaves the images folder": 1,
        "no imageId": 1,
        "entry is not an object with imageId, question, answer": 1,
        "empty question": 1,
    }
    assert collect("gqa", path, images=images / "gqa", samples_per_split=1)[0] == records


def cover(extension="jpg", split=1, **changes) -> dict:
    return {
        "imageURL": f"http://ecx.images-amazon.com/images/I/61Y5cOdHJbL.{extension}",
        "questions": ["Who wrote this book?", "Is this a crafts & hobbies related book?"],
        "answers": ["Mishá Ève", "No"],
        "title": "Mom's Family Wall Calendar 2016",
        "authorName": "Mishá Ève",
        "genre": "Calendars",
        "split": split,
    } | changes


COVERS = {
    "761183272": cover(),
    "1421539365": cover("png", answers=["Mishá Ève", ""]),
    "B00001": cover("gif", split="1"),
    "2": cover(split=2),
    "3": cover(split=3),
    "4": cover(split=None),
    "5": cover(answers=["one"]),
    "6": cover(questions=[], answers=[]),
    "7": "cover",
    "8": cover(),
    "9": cover(questions="Who?"),
}


def test_ocrvqa_as_published(images, tmp_path):
    path = write(tmp_path / "dataset.json", COVERS)
    records, skipped = collect("ocrvqa", tmp_path, images=images, samples_per_split=2)
    assert [(r.key, len(r.turns)) for r in records] == [
        ("761183272", 2),
        ("1421539365", 1),
        ("B00001", 2),
    ]
    assert records[0].turns[0] == Turn(f"<|image|>Who wrote this book?{SHORT_ANSWER}", "Mishá Ève")
    assert records[1].images[0][1:4] == b"PNG" and records[2].images[0][:3] == b"GIF"
    assert skipped == {
        "empty answer": 1,
        "validation split": 1,
        "test split": 1,
        "split is not 1, 2 or 3": 1,
        "not as many answers as questions": 1,
        "no questions": 1,
        "entry is not an object with questions, answers, split": 1,
        "image file is missing": 1,
        "questions and answers are not lists": 1,
    }
    path.write_text(f'{{"761183272": {json.dumps(cover())}, "761183272": {json.dumps(cover())}}}')
    records, skipped = collect("ocrvqa", tmp_path, images=images)
    assert len(records) == 1 and skipped == {"id of a cover occurs twice": 1}


CHOICES = ["skateboarder", "train", "delivery", "cab"]


def multiple_choice(number="22MexNkBPpdZGX6sxbxVBH", **changes) -> dict:
    return {
        "split": "train",
        "image_id": 299207,
        "question_id": number,
        "question": "What is the man by the bags awaiting?",
        "choices": CHOICES,
        "correct_choice_idx": 3,
        "direct_answers": ["ride", "ride", "bus", "taxi"],
        "difficult_direct_answer": False,
        "rationales": ["A train would not be on the street."],
    } | changes


def test_aokvqa_switches_the_order_of_the_choices(images, tmp_path):
    rows = [
        multiple_choice(),
        multiple_choice(),
        multiple_choice("a", image_id="000000299207", choices=CHOICES[2:], correct_choice_idx=1),
        multiple_choice("b", correct_choice_idx=None),
        multiple_choice("c", correct_choice_idx=4),
        multiple_choice("d", choices=["cab", "cab "], correct_choice_idx=0),
        multiple_choice("h", choices=["train", "train", "bus", "cab"]),  # C and D are one text
        multiple_choice("e", choices="cab"),
        multiple_choice("f", image_id=1),
        multiple_choice("g", choices=["cab", ""]),
        multiple_choice(None),
        3,
    ]
    source = write(tmp_path / "aokvqa_v1p0_train.json", rows)
    records, skipped = collect("aokvqa", tmp_path, images=images)
    assert [r.key for r in records] == [
        *(f"22MexNkBPpdZGX6sxbxVBH_{n}" for n in range(3)),
        "a_0",
        "a_1",
    ]
    assert len({r.turns for r in records}) == 5 == len({r.key for r in records})
    for record in records:
        (turn,) = record.turns
        head, *options, hint = turn.question.split("\n")
        assert head == "<|image|>What is the man by the bags awaiting?"
        assert f"\n{hint}" == LETTER_ANSWER
        assert f"{turn.answer}. cab" in options
        assert [option[:3] for option in options] == ["A. ", "B. ", "C. ", "D. "][: len(options)]
    assert sorted(o[3:] for o in options) == ["cab", "delivery"]
    assert len({record.turns[0].answer for record in records[:3]}) == 3
    assert skipped == {
        "question id occurs twice": 1,
        "no correct_choice_idx, as in the test split": 1,
        "correct_choice_idx is not that of a choice": 1,
        "choice occurs twice": 2,
        "choices are not a list of 2 to 26": 1,
        "image file is missing": 1,
        "empty choice": 1,
        "no question_id": 1,
        "entry is not an object with question_id, choices and so on": 1,
    }
    assert collect("aokvqa", source, images=images, samples_per_split=1)[0] == records


def test_letters_are_correct_equally_often():
    letters = Counter(o.index(0) for n in range(1000) for o in choice_orders(f"q{n}", 4))
    assert sum(letters.values()) == 3000 and min(letters.values()) > 690
    assert choice_orders("q1", 4) == choice_orders("q1", 4) != choice_orders("q2", 4)


@pytest.mark.parametrize("kind", ["vqav2", "okvqa", "gqa", "ocrvqa", "aokvqa"])
def test_another_file_is_refused_with_what_is_expected(images, tmp_path, kind):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty} holds no " in refused(kind, empty, images=images)
    path = tmp_path / "x_questions.json"
    path.write_text('{"questions": [\n{"a": 1},, ]}')
    error = refused(kind, path, images=images)
    assert str(path) in error and "line 2 column 10" in error
    assert "--images" in refused(kind, path)
    for content in ([], {}, ["x"], {"captions": [1]}, {"license": 1, "annotations": [{"id": 1}]}):
        error = refused(kind, write(path, content), images=images)
        assert f"{path} must be " in error and "it holds " in error
    assert "leave out --caption-column" in refused(kind, path, images=images, caption_column="a")


def test_the_two_files_of_vqa_are_told_apart(images, tmp_path):
    folder = excerpt(tmp_path / "vqa")
    error = refused("vqav2", folder / ANNOTATIONS, images=images)
    assert "must be VQA's file of questions" in error and "'annotations'" in error
    (folder / ANNOTATIONS).write_bytes((folder / QUESTIONS).read_bytes())
    error = refused("vqav2", folder, images=images)
    assert f"{folder / ANNOTATIONS} must be VQA's file of annotations" in error
    (folder / ANNOTATIONS).unlink()
    assert f"{folder / ANNOTATIONS} does not exist" in refused("vqav2", folder, images=images)
    other = (folder / QUESTIONS).rename(folder / "asked.json")
    assert "call the files NAME_questions.json" in refused("vqav2", other, images=images)


def test_changed_annotations_are_another_job(images, tmp_path):
    folder = excerpt(tmp_path / "vqa")
    options = ReadOptions(images, samples_per_split=1)
    before = [split.identity for split in FORMATS["vqav2"].plan(folder, options).splits]
    assert len(set(before)) == len(before) > 2
    path = folder / ANNOTATIONS
    path.write_text(path.read_text().replace("pitcher", "catcher"))
    after = [split.identity for split in FORMATS["vqav2"].plan(folder, options).splits]
    assert not set(before) & set(after)


def test_whole_runs(images, tmp_path):
    output = tmp_path / "vqav2"
    out = succeeded(tool(excerpt(tmp_path / "vqa"), "vqav2", output, "--images", images))
    assert "kept 2, skipped 12" in out
    assert report(output)["skipped"] == FAULTS
    assert [len(record.turns) for record in stored(output)] == [2, 1]
    output = tmp_path / "ocrvqa"
    source = write(tmp_path / "dataset.json", COVERS)
    arguments = ("--images", images / "ocr_vqa", "--jpeg-quality", 90)
    succeeded(tool(source, "ocrvqa", output, *arguments))
    assert [record.images[0][:3] for record in stored(output)] == [b"\xff\xd8\xff"] * 3
