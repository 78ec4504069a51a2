"""Files of benchmarks as people have them: a score is right, or the file is refused by name."""

import codecs
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tool
from PIL import Image

from megatron_owl2.errors import ScoreError, TaskError
from megatron_owl2.evaluation import benchmark
from megatron_owl2.evaluation.registry import find_benchmarks

TASKS = find_benchmarks()
POPE = {"question_id": 1, "image": "1.jpg", "text": "is it?", "label": "yes"}
QUESTION = {"question_id": 1, "image_id": 1, "question": "what?"}
ANNOTATION = QUESTION | {
    "question_type": "what",
    "multiple_choice_answer": "red",
    "answers": [{"answer": "red", "answer_id": k} for k in range(10)],
}
TALK = {
    "id": 1,
    "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
}
COCO_IMAGE, COCO_CAPTION = {"id": 1, "file_name": "1.jpg"}, {"image_id": 1, "id": 5, "caption": "a"}
APPLE = bytes.fromhex("00051607") + bytes(80)


def picture(folder: Path, name: str) -> Path:
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, path.suffix.replace(".jpg", ".jpeg")[1:].upper())
    return path


def dump(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_vqa(folder: Path, name: str = "questions.json", **changes) -> Path:
    dump(folder / "annotations.json", {"annotations": [ANNOTATION]})
    return dump(folder / name, {"questions": [QUESTION | changes]})


def asked(folder: Path, task: str = "vqav2") -> list[Path]:
    questions, _ = benchmark.read(TASKS[task], folder)
    return [image for question in questions for image in question.images]


BESIDE: dict[str, Callable[[Path], object]] = {
    "sidecar": lambda folder: dump(folder / "images/000000000001.json", {}),
    "caption file": lambda folder: dump(folder / "images/000000000001.txt", "x"),
    "resource fork": lambda folder: (folder / "images/._000000000001.jpg").write_bytes(APPLE),
    "mask": lambda folder: picture(folder, "mask_000000000001.png"),
    "resized": lambda folder: picture(folder, "small-1.jpg"),
    "another number": lambda folder: picture(folder, "COCO_val2014_000000000021.jpg"),
    "folder": lambda folder: (folder / "images/1.jpg.d").mkdir(),
    "folder of the name": lambda folder: (folder / "images/0001.png").mkdir(),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize(
    "name",
    [
        "COCO_val2014_000000000001.jpg",
        "000000000001.jpg",
        "1.png",
        "abstract_v002_val2015_000000000001.png",
    ],
)
def test_the_image_that_a_number_means_is_shown(tmp_path, beside, name):
    write_vqa(tmp_path)
    expected = picture(tmp_path, name)
    BESIDE[beside](tmp_path)
    assert asked(tmp_path) == [expected]


@pytest.mark.parametrize(
    ("questions", "names", "meant"),
    [
        ("questions.json", ["COCO_val2014_000000000001.jpg", "1.jpg"], 0),
        ("v2_OpenEnded_mscoco_val2014_questions.json", ["COCO_val2014_1.jpg", "COCO_x_1.jpg"], 0),
        ("v2_OpenEnded_mscoco_val2014_questions.json", ["COCO_train2014_01.jpg", "1.png"], 0),
        ("v2_OpenEnded_mscoco_test-dev2015_questions.json", ["COCO_test2015_1.jpg", "1.png"], 0),
        ("questions.json", ["COCO_val2014_1.jpg", "COCO_val2014_1.png"], None),
        ("questions.json", ["COCO_val2014_1.jpg", "COCO_train2014_1.jpg"], None),
        ("questions.json", ["1.jpg", "000000000001.jpg"], None),
        ("questions.json", ["1.jpg", "1.png"], None),
    ],
)
def test_of_two_images_the_benchmarks_own_name_is_meant_or_none(tmp_path, questions, names, meant):
    write_vqa(tmp_path, questions)
    paths = [picture(tmp_path, name) for name in names]
    if meant is not None:
        assert asked(tmp_path) == [paths[meant]]
        return
    with pytest.raises(TaskError, match="image 1 may be .* or .*; leave one of them") as error:
        asked(tmp_path)
    assert all(name in str(error.value) for name in names)


def test_an_image_that_is_not_there_is_named_as_such_by_every_task(tmp_path):
    write_vqa(tmp_path / "vqav2", "v2_OpenEnded_mscoco_val2014_questions.json")
    picture(tmp_path / "vqav2", "mask_000000000001.png")
    dump(tmp_path / "pope/coco_pope_x.json", [POPE])
    content = {"images": [COCO_IMAGE], "annotations": [COCO_CAPTION]}
    dump(tmp_path / "caption/captions.json", content)
    for task in ("vqav2", "pope", "caption"):
        with pytest.raises(TaskError, match=r"1 images of .*\.json do not exist, such as .*1\.jpg"):
            asked(tmp_path / task, task)
    write_vqa(tmp_path / "bare")
    with pytest.raises(TaskError, match="bare/images does not exist; the images of .* go there"):
        asked(tmp_path / "bare")


def test_captions_of_unlisted_images_are_no_wrong_format(tmp_path):
    content = {"images": [COCO_IMAGE], "annotations": [COCO_CAPTION | {"image_id": 7}]}
    file = dump(tmp_path / "captions.json", content)
    with pytest.raises(TaskError, match="1 images have captions but are not listed .* such as 7"):
        asked(file, "caption")
    content["images"] = [COCO_IMAGE | {"id": 7}, {"id": 7, "file_name": "other.jpg"}]
    dump(file, content)
    with pytest.raises(TaskError, match="image 7 is both 1.jpg and other.jpg"):
        asked(file, "caption")


@pytest.mark.parametrize("name", ["../1.jpg", "/etc/passwd", "a/../../1.jpg", "..\\1.jpg", "a\0b"])
def test_an_image_outside_the_folder_is_refused(tmp_path, name):
    file = dump(tmp_path / "coco_pope_x.json", [POPE | {"image": name}])
    with pytest.raises(TaskError, match="is no path in .*images"):
        asked(file, "pope")


def test_questions_and_annotations_of_two_sets_are_refused(tmp_path):
    write_vqa(tmp_path, image_id=2)
    picture(tmp_path, "2.jpg")
    with pytest.raises(TaskError, match="question 1 is about image 2, its annotation about 1"):
        asked(tmp_path)


def test_hidden_files_are_no_question_files(tmp_path):
    write_vqa(tmp_path)
    expected = picture(tmp_path, "1.jpg")
    for name in ("._questions.json", "._annotations.json", ".old_questions.json"):
        (tmp_path / name).write_bytes(APPLE)
    assert asked(tmp_path) == [expected]


def without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


FIELDS = {
    "pope": (POPE, ("question_id", "label")),
    "vqav2": (ANNOTATION, ("question_id", "question_type", "multiple_choice_answer", "answers")),
    "text": (TALK, ("id", "conversations")),
    "caption": (COCO_CAPTION, ("image_id", "caption")),
}
UNDER = {"vqav2": "annotations", "caption": "annotations"}


def gold_file(path: Path, task: str, rows: list) -> Path:
    return dump(path, {UNDER[task]: rows} if task in UNDER else rows)


@pytest.mark.parametrize(
    ("task", "field"), [(task, field) for task, (_, fields) in FIELDS.items() for field in fields]
)
@pytest.mark.parametrize("value", ["missing", None, 1.5, [], {}, True])
def test_gold_is_checked_field_by_field(tmp_path, task, field, value):
    row, _ = FIELDS[task]
    bad = without(row, field) if value == "missing" else row | {field: value}
    other = row | {TASKS[task].id_field: 2}
    file = gold_file(tmp_path / "gold.json", task, [other, bad])
    with pytest.raises(TaskError) as error:
        benchmark.read_gold(TASKS[task], file)
    reason = "is missing" if value == "missing" else re.escape(f"is {value!r}, wanted")
    said = rf"gold.json is not in the format that the task reads: '{field}' {reason}.*\(entry 2"
    assert re.search(said, str(error.value))


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([{"answer": "red"}, "red"], r"'answers\[1\]' is 'red', wanted an object"),
        ([{"answer": "red"}, {"answer": 3}], r"'answers\[1\].answer' is 3, wanted a text"),
        ([{}, {}], r"'answers\[0\].answer' is missing; it has no field"),
    ],
)
def test_gold_is_checked_to_its_depth(tmp_path, answers, reason):
    file = gold_file(tmp_path / "gold.json", "vqav2", [ANNOTATION | {"answers": answers}])
    with pytest.raises(TaskError, match=reason):
        benchmark.read_gold(TASKS["vqav2"], file)


@pytest.mark.parametrize("label", ["yes", "Yes", " YES\n"])
def test_a_label_in_other_letters_is_the_same(tmp_path, label):
    file = dump(tmp_path / "gold.json", [POPE | {"label": label}])
    gold = benchmark.read_gold(TASKS["pope"], file)
    assert benchmark.score(TASKS["pope"], {1: "Yes."}, gold)["overall"]["accuracy"] == 100.0


@pytest.mark.parametrize("label", ["maybe", "y", "", 1, None, "yes no"])
def test_a_label_outside_the_set_is_refused_by_name(tmp_path, label):
    file = dump(tmp_path / "gold.json", [POPE | {"label": label}])
    wanted = re.escape(f"'label' is {label!r}, wanted 'yes' or 'no'")
    with pytest.raises(TaskError, match=wanted):
        benchmark.read_gold(TASKS["pope"], file)


@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_checked_field_by_field(tmp_path, task):
    names = (TASKS[task].id_field, TASKS[task].answer_field)
    row = dict(zip(names, (1, "a"), strict=True))
    for bad in (without(row, names[0]), without(row, names[1]), row | {names[1]: None}, [], "x"):
        file = tmp_path / "said.jsonl"
        file.write_text(f"{json.dumps(row)}\n\n{json.dumps(bad)}\n")
        with pytest.raises(TaskError, match=r"said.jsonl is not in the format .*\(line 3\)"):
            benchmark.read_predictions(TASKS[task], file)
    file.write_text("\n")
    with pytest.raises(TaskError, match="said.jsonl holds no prediction"):
        benchmark.read_predictions(TASKS[task], file)


TEXT = "\n".join(json.dumps({"question_id": i, "answer": f"a\u2028b{i}"}) for i in (1, 2))
LINES = TEXT.replace("\\u2028", "\u2028")


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        codecs.BOM_UTF8 + LINES.encode() + b"\n\n",
        LINES.replace("\n", "\r\n").encode(),
        LINES.encode("utf-16"),
        f"[{LINES.replace(chr(10), ',')}]".encode(),
        codecs.BOM_UTF8 + f" [{LINES.replace(chr(10), ',')}]".encode(),
        f"[{LINES.replace(chr(10), ',')}]".encode("utf-16"),
    ],
    ids=["lines", "mark", "crlf", "utf-16", "list", "list, mark", "list, utf-16"],
)
def test_predictions_are_read_as_editors_save_them(tmp_path, data):
    file = tmp_path / "said.jsonl"
    file.write_bytes(data)
    assert benchmark.read_predictions(TASKS["pope"], file) == {1: "a\u2028b1", 2: "a\u2028b2"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"question_id": 1, "answer": "a"}\n{"question_id"', "line 2: Expecting"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (b"caf\xe9", "it is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"answers": [\n]', "line 1: Expecting"),
    ],
)
def test_predictions_that_are_not_json_are_told_with_the_line(tmp_path, data, reason):
    file = tmp_path / "said.jsonl"
    file.write_bytes(data)
    with pytest.raises(TaskError, match=f"said.jsonl cannot be read: .*{reason}"):
        benchmark.read_predictions(TASKS["pope"], file)


def test_ids_written_as_texts_and_as_numbers_are_the_same(tmp_path):
    gold = {1: POPE, 2: POPE | {"question_id": 2}}
    assert benchmark.score(TASKS["pope"], {"1": "yes", 2: "yes"}, gold)["overall"]["n"] == 2
    texts = {"1": POPE, "2": POPE}
    assert benchmark.score(TASKS["pope"], {1: "yes", 2: "yes"}, texts)["overall"]["n"] == 2
    with pytest.raises(ScoreError, match="the id 1 twice, as a number and as a text"):
        benchmark.score(TASKS["pope"], {"1": "yes", 1: "no", 2: "no"}, gold)
    file = dump(tmp_path / "said.json", [{"question_id": 1.0, "answer": "yes"}])
    assert benchmark.read_predictions(TASKS["pope"], file) == {1: "yes"}


def test_the_score_command_names_the_files(tmp_path):
    gold = dump(tmp_path / "gold.json", [without(POPE, "label")])
    said = dump(tmp_path / "said.json", [{"question_id": 1, "answer": "yes"}])
    command = ("evaluate", "score", "--task", "pope", "--predictions", said, "--gold", gold)
    done = tool.run(*command)
    missing = "is not in the format that the task reads: 'label' is missing; it has 'question_id', "
    told = f"error: {gold} {missing}'image', 'text' (entry 1)\n"
    assert (done.returncode, done.stderr) == (2, told)
    dump(gold, [POPE | {"question_id": 5}])
    done = tool.run(*command)
    assert done.returncode == 2 and f"{said} and {gold}: 1 of 1 gold questions" in done.stderr
