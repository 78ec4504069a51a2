"""Benchmark files that differ from the published ones: ids, several sets in a folder, odd texts."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_owl2.config.schema import ModelConfig, ParallelConfig, VisionConfig
from megatron_owl2.errors import ScoreError, TaskError
from megatron_owl2.evaluation import benchmark, rows, runner, tables
from megatron_owl2.evaluation.registry import find_benchmarks
from megatron_owl2.mcore import setup

TASKS = find_benchmarks()
ANSWERS = [{"answer": "red", "answer_id": k} for k in range(10)]
MARK = "<|image|>"


def dump(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def image(folder: Path, name: str) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / "images" / name)
    return folder / "images" / name


def question(i=1, image_id=1, **more) -> dict:
    return {"question_id": i, "image_id": image_id, "question": "what?"} | more


def annotation(i=1, answers=ANSWERS, **more) -> dict:
    row = {"question_id": i, "question_type": "what", "multiple_choice_answer": "red"}
    return row | {"answers": answers} | more


def pope(i=1, **more) -> dict:
    return {"question_id": i, "image": f"{i}.jpg", "text": "is it?", "label": "no"} | more


def dialogue(*roles, **more) -> dict:
    return {"id": 1, "conversations": [{"from": role, "value": "hi"} for role in roles]} | more


@pytest.mark.parametrize(
    ("subtype", "name", "meant"),
    [
        ("val2014", "questions.json", "COCO_val2014_1.jpg"),
        ("train2014", "v2_OpenEnded_mscoco_val2014_questions.json", "COCO_train2014_1.jpg"),
        ("shapes", "mscoco_val2014_questions.json", "COCO_val2014_1.jpg"),
        (None, "train2014_questions.json", "COCO_train2014_1.jpg"),
        ("test-dev2015", "questions.json", "COCO_test2015_1.jpg"),
        (14, "questions.json", None),
    ],
)
def test_the_split_is_what_the_questions_say(tmp_path, subtype, name, meant):
    dump(tmp_path / name, {"data_subtype": subtype, "questions": [question()]})
    dump(tmp_path / "annotations.json", {"annotations": [annotation()]})
    for split in ("val2014", "train2014", "test2015"):
        image(tmp_path, f"COCO_{split}_1.jpg")
    if meant:
        questions, _ = benchmark.read(TASKS["vqav2"], tmp_path)
        assert questions[0].images == (tmp_path / "images" / meant,)
    else:
        with pytest.raises(TaskError, match="image 1 may be .*test2015.* or .*train2014"):
            benchmark.read(TASKS["vqav2"], tmp_path)


@pytest.mark.parametrize(("asked", "answered"), [("1", 1), (1, "1"), (1.0, 1)])
def test_ids_of_questions_and_gold_may_be_texts_or_numbers(tmp_path, asked, answered):
    dump(tmp_path / "questions.json", {"questions": [question(asked)]})
    dump(tmp_path / "annotations.json", {"annotations": [annotation(answered)]})
    coco = {"images": [{"id": asked, "file_name": "1.jpg"}]}
    coco["annotations"] = [{"image_id": answered, "caption": "a"}]
    dump(tmp_path / "captions.json", coco)
    image(tmp_path, "1.jpg")
    for task in ("vqav2", "caption"):
        questions, gold = benchmark.read(TASKS[task], tmp_path)
        assert [q.id for q in questions] == list(gold) == [answered]


def test_an_id_twice_in_other_types_is_refused(tmp_path):
    file = dump(tmp_path / "questions.json", {"questions": [question(1), question("1")]})
    dump(tmp_path / "annotations.json", {"annotations": [annotation(1)]})
    image(tmp_path, "1.jpg")
    with pytest.raises(TaskError, match="1 questions of .* have no annotation, such as '1'"):
        benchmark.read(TASKS["vqav2"], file)
    with pytest.raises(ScoreError, match="the id 1 twice, as a number and as a text"):
        benchmark.score(TASKS["pope"], {1: "no", "1": "no"}, {1: pope()})


GOLD_NAMES = ("v2_mscoco_train2014_annotations.json", "v2_mscoco_val2014_annotations.json")


@pytest.mark.parametrize(
    ("name", "others", "meant"),
    [
        ("v2_OpenEnded_mscoco_val2014_questions.json", GOLD_NAMES, 1),
        ("v2_OpenEnded_mscoco_train2014_questions.json", GOLD_NAMES, 0),
        (
            "v2_OpenEnded_mscoco_val2014_questions.json",
            ("mscoco_val2014_annotations.json", "v2_mscoco_val2014_annotations.json"),
            1,
        ),
        ("questions.json", ("annotations.json", "v2_annotations.json"), 0),
        ("my_questions.json", GOLD_NAMES, None),
    ],
)
def test_questions_of_a_folder_of_several_sets_find_their_gold(tmp_path, name, others, meant):
    file = dump(tmp_path / name, {"questions": [question()]})
    for number, other in enumerate(others):
        row = annotation(multiple_choice_answer=str(number))
        dump(tmp_path / other, {"annotations": [row]})
    image(tmp_path, "1.jpg")
    if meant is None:
        with pytest.raises(TaskError, match=f"several files .*; leave the one .* to {name}"):
            benchmark.read(TASKS["vqav2"], file)
    else:
        assert benchmark.read(TASKS["vqav2"], file)[0][0].gold == str(meant)


@pytest.mark.parametrize("others", [GOLD_NAMES[1:], (GOLD_NAMES[1], "test_annotations.json")])
def test_gold_of_another_split_alone_is_told_as_such(tmp_path, others):
    name = "v2_OpenEnded_mscoco_train2014_questions.json"
    file = dump(tmp_path / name, {"questions": [question()]})
    for other in others:
        dump(tmp_path / other, {"annotations": [annotation()]})
    image(tmp_path, "1.jpg")
    with pytest.raises(TaskError, match="holds no .* only of another split .*; put its") as error:
        benchmark.read(TASKS["vqav2"], file)
    assert name in str(error.value) and all(other in str(error.value) for other in others)


@pytest.mark.parametrize(
    ("task", "content", "reason"),
    [
        ("pope", [pope(), pope(2, text=f"is {MARK} it?")], "text of question 2 holds <.image.>"),
        ("pope", [pope(text="\ud800")], r"'text' is '\\ud800', wanted a text of whole characters"),
        ("pope", [pope("\udfff")], "'question_id' .* wanted a text of whole characters"),
        ("pope", [pope(image="x" * 300 + ".jpg")], r"'x+\.\.\. is no path in"),
        ("pope", [pope(image="\0.jpg")], "is no path in"),
        ("pope", [pope(image=["1.jpg"])], r"'image' is \['1.jpg'\], wanted a text \(entry 1\)"),
        ("pope", {"questions": [pope()]}, r"'question_id' is missing; it has 'questions'"),
        ("text", [dialogue("user", "assistant")], r"\(human, gpt\); it is 'user', 'assistant'"),
        ("text", [dialogue(*["human", "gpt"] * 9)], r"it is 'human', .*, \.\.\. \(entry 1\)$"),
        ("text", [dialogue("human", "gpt", image="1.jpg")], "1 has an image, which this task"),
        ("text", [dialogue("human", "gpt", images=["1.jpg"])], "1 has an image, which this task"),
    ],
)
def test_rows_that_would_be_asked_wrongly_are_refused(tmp_path, task, content, reason):
    file = dump(tmp_path / "rows.json", content)
    for name in ("1.jpg", "2.jpg"):
        image(tmp_path, name)
    with pytest.raises(TaskError, match=reason):
        benchmark.read(TASKS[task], file)


def test_an_answer_that_no_other_annotator_can_match_is_refused(tmp_path):
    for count in (1, 2):
        gold = dump(tmp_path / "gold.json", {"annotations": [annotation(answers=ANSWERS[:count])]})
        if count == 1:
            with pytest.raises(TaskError, match=r"'answers' is .*, wanted a list with 2 entries"):
                benchmark.read_gold(TASKS["vqav2"], gold)
    scores = benchmark.score(TASKS["vqav2"], {1: "red"}, benchmark.read_gold(TASKS["vqav2"], gold))
    assert scores["overall"]["accuracy"] == 33.33


def test_one_object_over_several_lines_is_a_row(tmp_path):
    file = tmp_path / "said.json"
    file.write_text(json.dumps({"question_id": 1, "answer": "no"}, indent=2))
    assert benchmark.read_predictions(TASKS["pope"], file) == {1: "no"}
    file.write_text(json.dumps({"question_id": 1, "text": "no"}, indent=2))
    missing = r"'answer' is missing; it has 'question_id', 'text' \(the only entry\)"
    with pytest.raises(TaskError, match=missing):
        benchmark.read_predictions(TASKS["pope"], file)
    dump(file, {"questions": []})
    with pytest.raises(TaskError, match="object with a list 'annotations'; it has 'questions'"):
        benchmark.read_gold(TASKS["vqav2"], file)


@pytest.mark.parametrize(
    ("answer", "unclear"),
    [("no", 0), ("Yes, it is", 0), ("YES", 0), ("NO", 1), ("", 1), ("maybe", 1), ("eyes", 1)],
)
def test_answers_outside_popes_rule_are_counted_and_shown(answer, unclear):
    scores = benchmark.score(TASKS["pope"], {1: answer}, {1: pope()})
    assert scores["overall"]["unclear"] == unclear
    assert ('1 answers have no "yes"' in tables.table(scores)) == bool(unclear)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], r"'a' is \[\], wanted an object"),
        ({}, "'a.b' is missing; it has no field"),
        ({"b": 1}, r"'a.b' is 1, wanted a list with an entry"),
        ({"b": [["x"], [2]]}, r"'a.b\[1\]\[0\]' is 2, wanted a text"),
    ],
)
def test_a_field_is_named_with_what_holds_it(tmp_path, content, reason):
    file = dump(tmp_path / "rows.json", [{"a": content}])
    fields = {"a": rows.object_of(b=rows.list_of(rows.list_of(rows.text)))}
    with pytest.raises(TaskError, match=f"{reason}.* \\(entry 1\\)"):
        rows.read_rows(file, fields)


class Unasked:
    """A generator that is not reached."""

    generate = None

    def __init__(self, loaded):
        pass


@pytest.mark.parametrize("limit", [None, 1])
def test_an_unreadable_image_is_told_with_its_question(tmp_path, monkeypatch, limit):
    file = dump(tmp_path / "pope.json", [pope("first"), pope("second")])
    image(tmp_path, "second.jpg")
    (tmp_path / "images/first.jpg").write_bytes(b"nothing")
    monkeypatch.setattr(runner, "Generator", Unasked)
    setup.initialize(ParallelConfig())
    loaded = type("Loaded", (), {"config": ModelConfig(vision=VisionConfig(image_size=28))})
    questions, gold = benchmark.read(TASKS["pope"], file, limit)
    assert len(questions) == len(gold) == (limit or 2)
    told = r"images/first.jpg: .*\(the image of question 'first'\)"
    with pytest.raises(TaskError, match=told):
        runner.evaluate(loaded, "pope", questions, gold, tmp_path, runner.Settings(), {})


def test_okvqa_may_leave_its_unscored_majority_out(tmp_path):
    rows = {"annotations": [annotation(multiple_choice_answer=None), annotation(2)]}
    gold = benchmark.read_gold(
        TASKS["okvqa"], dump(tmp_path / "mscoco_val2014_annotations.json", rows)
    )
    assert [row["majority"] for row in gold.values()] == ["red", "red"]
