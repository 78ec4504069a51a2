"""OK-VQA, TextVQA, VizWiz and GQA: files as published, scores by hand, and files for servers."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import benchmark
from megatron_owl2.evaluation.registry import find_benchmarks
from megatron_owl2.evaluation.vqa_accuracy import evalai_answer
from megatron_owl2.evaluation.vqa_accuracy import score as vqa_score

TASKS = find_benchmarks()
SHORT = "Answer the question using a single word or phrase."
TEXTVQA, ROSETTA = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json"


def dump(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def image(folder: Path, name: str) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / "images" / name)
    return folder / "images" / name


def annotators(*answers: str) -> list[dict]:
    return [
        {"answer_id": n, "raw_answer": f"{answer}s", "answer_confidence": "yes", "answer": answer}
        for n, answer in enumerate(answers, 1)
    ]


def okvqa(folder: Path) -> Path:
    question = {"image_id": 297147, "question": "What sport is it?", "question_id": 2971475}
    annotation = {
        "image_id": 297147,
        "answer_type": "other",
        "question_type": "four",
        "question_id": 2971475,
        "answers": annotators(*["race"] * 4, *["motocross"] * 6),
        "confidence": 3,
    }
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    head["data_subtype"] = "val2014"
    name = "OpenEnded_mscoco_val2014_questions.json"
    dump(folder / name, head | {"questions": [question]})
    dump(folder / "mscoco_val2014_annotations.json", head | {"annotations": [annotation]})
    image(folder, "COCO_val2014_000000297147.jpg")
    return folder


def test_okvqa_as_published(tmp_path):
    questions, gold = benchmark.read(TASKS["okvqa"], okvqa(tmp_path))
    (question,) = questions
    assert (question.id, question.skill, question.gold) == (2971475, "four", "motocross")
    assert question.images[0].name == "COCO_val2014_000000297147.jpg"
    assert question.prompt(TASKS["okvqa"].suffix) == (
        f"USER: <|image|>What sport is it? {SHORT} ASSISTANT:"
    )
    # Four say race: each sees 3 others or 4, so at least 3 of them.
    scores = benchmark.score(TASKS["okvqa"], {2971475: "Race."}, gold)
    assert scores["skills"]["four"] == {
        "accuracy": 100.0,
        "majority": 100.0,
        "n": 1,
        "unreachable": 0,
    }
    assert benchmark.score(TASKS["okvqa"], {2971475: "races"}, gold)["overall"]["accuracy"] == 0


def textvqa_row(i=34602, **more) -> dict:
    row = {
        "question_id": i,
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_width": 1024,
        "image_height": 664,
        "image_classes": ["Cassette deck", "Printer"],
        "flickr_original_url": "https://farm2.staticflickr.com/x.jpg",
        "question_tokens": ["what", "is"],
        "answers": ["nous les gosses", *["dakota"] * 6, "clos culombu", "dakota digital", "dakota"],
        "set_name": "val",
    }
    return row | more


def textvqa(folder: Path, rows: list | None = None, tokens: list | None = None) -> Path:
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    dump(folder / TEXTVQA, head | {"data": rows or [textvqa_row()]})
    if tokens is not None:
        found = [{"image_id": "003a8ae2ef43b901", "ocr_tokens": tokens, "ocr_info": []}]
        dump(folder / ROSETTA, {"dataset_name": "ocr_en", "data": found})
    image(folder, "003a8ae2ef43b901.jpg")
    return folder


def test_textvqa_with_and_without_tokens(tmp_path):
    folder = textvqa(tmp_path, tokens=["DAKOTA", "DIGITAL"])
    (question,), gold = benchmark.read(TASKS["textvqa"], folder)
    asked = "USER: <|image|>what is the brand of this camera?"
    assert question.prompt(TASKS["textvqa"].suffix) == f"{asked} {SHORT} ASSISTANT:"
    assert (question.id, question.gold) == (34602, "dakota")
    for said, accuracy in (("Dakota", 100.0), ("dakota digital", 30.0), ("the", 0.0)):
        scores = benchmark.score(TASKS["textvqa"], {34602: said}, gold, "evalai")
        assert scores["overall"]["accuracy"] == accuracy
    (shown,), same = benchmark.read(TASKS["textvqa_ocr"], folder)
    assert shown.prompt(TASKS["textvqa_ocr"].suffix) == (
        f"{asked}\nReference OCR token: DAKOTA, DIGITAL\n{SHORT} ASSISTANT:"
    )
    assert same == gold and shown.images == question.images
    textvqa(tmp_path, tokens=[])  # an image in which nothing was read
    (shown,), _ = benchmark.read(TASKS["textvqa_ocr"], folder)
    assert shown.text.endswith("\nReference OCR token: ")


def test_textvqa_without_the_tokens_of_an_image_is_refused(tmp_path):
    folder = textvqa(tmp_path)
    pattern = r"must hold one file TextVQA_Rosetta_OCR_\*_val.json; it has 0"
    with pytest.raises(TaskError, match=pattern):
        benchmark.read(TASKS["textvqa_ocr"], folder)
    textvqa(tmp_path, [textvqa_row(), textvqa_row(2, image_id="ffff")], tokens=["A"])
    image(tmp_path, "ffff.jpg")
    with pytest.raises(TaskError, match=r"1 questions of TextVQA_0.5.1_val.json are .* as ffff"):
        benchmark.read(TASKS["textvqa_ocr"], folder)


def test_vizwiz_as_published(tmp_path):
    rows = [
        {
            "image": "VizWiz_val_00000000.jpg",
            "question": "Ok. There is another picture I hope it is a better one.",
            "answers": [
                {"answer_confidence": "yes", "answer": answer}
                for answer in ["unanswerable"] * 8 + ["unsuitable"] * 2
            ],
            "answer_type": "unanswerable",
            "answerable": 0,
        },
    ]
    dump(tmp_path / "val.json", rows)
    dump(tmp_path / "test.json", [{"image": "VizWiz_test_1.jpg", "question": "What's this?"}])
    image(tmp_path, "VizWiz_val_00000000.jpg")
    image(tmp_path, "VizWiz_test_1.jpg")
    (question,), gold = benchmark.read(TASKS["vizwiz"], tmp_path / "val.json")
    assert question.skill == question.gold == "unanswerable"
    assert question.prompt(TASKS["vizwiz"].suffix).endswith(
        "a better one.\nWhen the provided information is insufficient, respond with "
        f"'Unanswerable'.\n{SHORT} ASSISTANT:"
    )
    for said, accuracy in (("Unanswerable", 100.0), ("unsuitable", 60.0)):
        scores = benchmark.score(TASKS["vizwiz"], {question.id: said}, gold)
        assert scores["overall"]["accuracy"] == accuracy
    with pytest.raises(TaskError, match="'answers' is missing; it has 'image', 'question'"):
        benchmark.read(TASKS["vizwiz"], tmp_path / "test.json")
    (asked,), none = benchmark.read(TASKS["vizwiz"], tmp_path / "test.json", with_gold=False)
    assert (asked.gold, none) == (None, {})
    assert TASKS["vizwiz"].submission({asked.id: "It's Bob's Tea, no?"}, {}) == (
        "evalai.json",
        b'[{"image": "VizWiz_test_1.jpg", "answer": "it \'s bob \'s tea no"}]',
    )


GQA = {
    "201307251": {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
        "entailed": [],
        "equivalent": ["201307251"],
        "question": "Is it overcast?",
        "imageId": "n161313",
        "isBalanced": True,
        "groups": {"global": None, "local": "13-weather"},
        "answer": "no",
        "semanticStr": "select: scene->verify weather: cloudy [0]",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
        "fullAnswer": "No, it is clear.",
    },
    "2": {
        "question": "Who wears it?",
        "imageId": "15",
        "answer": "t-shirt",
        "types": {"structural": "query"},
    },
}


def test_gqa_as_published(tmp_path):
    file = dump(tmp_path / "testdev_balanced_questions.json", GQA)
    paths = [image(tmp_path, name) for name in ("n161313.jpg", "15.jpg")]
    questions, gold = benchmark.read(TASKS["gqa"], tmp_path)
    assert [(q.id, q.skill, q.gold) for q in questions] == [
        ("201307251", "verify", "no"),
        ("2", "query", "t-shirt"),
    ]
    assert [q.images for q in questions] == [(path,) for path in paths]
    cases = [
        ({"201307251": "No..", "2": "T-shirt."}, 100.0, 100.0),
        ({"201307251": "No!", "2": "tshirt"}, 0.0, 100.0),
        ({"201307251": "No, it is", "2": "t shirt"}, 0.0, 0.0),
    ]
    for said, exact, unpunctuated in cases:
        assert benchmark.score(TASKS["gqa"], said, gold)["overall"]["accuracy"] == exact
        scores = benchmark.score(TASKS["gqa"], said, gold, "unpunctuated")
        assert scores["overall"]["accuracy"] == unpunctuated
    name, content = TASKS["gqa"].submission({"201307251": "No.", "2": "Red"}, gold)
    assert (name, json.loads(content)) == (
        "gqa.json",
        [
            {"questionId": "201307251", "prediction": "no"},
            {"questionId": "2", "prediction": "red"},
        ],
    )
    file.write_text('{"1": {"question": "a", "imageId": 1}, "1": {}}')
    with pytest.raises(TaskError, match="an object has '1' twice"):
        benchmark.read(TASKS["gqa"], tmp_path)
    dump(file, {"7": {"question": "a", "imageId": 15}})
    with pytest.raises(TaskError, match=r"'answer' is missing; .*\(entry '7'\)"):
        benchmark.read(TASKS["gqa"], tmp_path)
    assert benchmark.read(TASKS["gqa"], tmp_path, with_gold=False)[0][0].images == (paths[1],)
    dump(file, [])
    with pytest.raises(TaskError, match="it must be an object"):
        benchmark.read(TASKS["gqa"], tmp_path)


def test_vqa_without_published_answers_is_asked_for_its_file(tmp_path):
    folder = okvqa(tmp_path)
    (folder / "mscoco_val2014_annotations.json").unlink()
    (question,), gold = benchmark.read(TASKS["vqav2"], folder, with_gold=False)
    assert (question.skill, question.gold, gold) == ("question", None, {})
    _, content = TASKS["vqav2"].submission({question.id: "Two, the cats"}, {})
    assert json.loads(content) == [{"question_id": 2971475, "answer": "2 cats"}]
    with pytest.raises(TaskError, match="this task has no file for a server"):
        benchmark.read(TASKS["okvqa"], folder, with_gold=False)


@pytest.mark.parametrize(
    ("text", "processed"),
    [
        ("Yes, it is?", "yes it is"),
        ("1,000", "1000"),
        ("a cat's tail", "cat 's tail"),
        ("What's up-town", "what 's up town"),
        ("ten. Dogs", "10 dogs"),
        ("two/three", "2 3"),
        ("dont", "don't"),
    ],
)
def test_answers_for_evalai(text, processed):
    assert evalai_answer(text) == processed


def test_the_three_rules_disagree_where_they_are_known_to():
    def accuracy(said: str, answers: list[str], variant: str) -> float:
        gold = {1: {"answers": answers, "skill": "x", "majority": answers[0]}}
        return vqa_score({1: said}, gold, variant)["overall"]["accuracy"]

    cases = {  # what is said, the annotators, and the score under owl2, official, evalai
        ("Cat.", ("cat",) * 10): (100.0, 0.0, 100.0),
        ("Cat.", ("cat",) * 9 + ("dog",)): (100.0, 100.0, 100.0),
        ("two", ("two",) * 10): (0.0, 100.0, 100.0),
        ("bob's", ("bob s",) * 4 + ("bob 's",) * 6): (0.0, 0.0, 100.0),
        ("the Cat", ("The Cat",) * 9 + ("x",)): (0.0, 100.0, 100.0),
    }
    for (said, answers), expected in cases.items():
        got = tuple(accuracy(said, list(answers), v) for v in ("owl2", "official", "evalai"))
        assert got == expected, (said, answers)
