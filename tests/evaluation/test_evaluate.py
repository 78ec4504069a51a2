"""Evaluation from published files to predictions and scores."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from evaluations import build_corpus, build_model, write_vqa
from paths import TOOLS
from PIL import Image

from megatron_owl2.config.schema import ModelConfig, ParallelConfig, VisionConfig
from megatron_owl2.config.templates import TEMPLATES
from megatron_owl2.data import images
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import benchmark, runner
from megatron_owl2.evaluation.fingerprint import mark_of_model
from megatron_owl2.evaluation.registry import find_benchmarks
from megatron_owl2.evaluation.runner import Settings
from megatron_owl2.inference import api, loading
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import load_model
from megatron_owl2.mcore import setup

pytestmark = pytest.mark.distributed

TASKS = find_benchmarks()
SHORT = " Answer the question using a single word or phrase."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("shapes") / "corpus")


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    return build_model(corpus / "tokenizer" / "tokenizer.model", tmp_path_factory.mktemp("run"))


def run_tool(monkeypatch, name: str, *arguments) -> int:
    path = TOOLS / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    return runpy.run_path(str(path))["main"]()


def test_prompts_are_the_official_ones_up_to_the_colon(corpus):
    question = benchmark.read(TASKS["vqav2"], corpus / "eval/seen")[0][0]
    text = question.text
    assert question.prompt(TASKS["vqav2"].suffix) == f"USER: <|image|>{text}{SHORT} ASSISTANT:"
    assert question.prompt("") == f"USER: <|image|>{text} ASSISTANT:"
    vicuna = TEMPLATES["vicuna_v1"]
    asked = f"{vicuna.system} USER: <|image|>\n{text} ASSISTANT:"
    assert question.prompt("", vicuna) == asked
    assert TASKS["pope"].suffix == SHORT
    caption = benchmark.read(TASKS["caption"], corpus / "eval/seen")[0][0]
    assert caption.prompt(TASKS["caption"].suffix) == (
        "USER: <|image|>Provide a one-sentence caption for the provided image. ASSISTANT:"
    )
    dialogue = benchmark.read(TASKS["text"], corpus / "eval/text")[0][0]
    assert dialogue.prompt(TASKS["text"].suffix) == f"USER: {dialogue.text} ASSISTANT:"


def test_the_corpus_is_read_and_its_gold_scores_full_marks(corpus):
    for name, variant in (("vqav2", "official"), ("pope", None), ("caption", None), ("text", None)):
        data = corpus / "eval" / ("text" if name == "text" else "heldout")
        questions, gold = benchmark.read(TASKS[name], data)
        assert len(questions) == len(gold) > 0
        answers = {question.id: question.gold for question in questions}
        scores = benchmark.score(TASKS[name], answers, gold, variant)
        assert scores["overall"]["accuracy"] == 100.0
        assert sum(row["n"] for row in scores["skills"].values()) == len(questions)
        assert set(scores["skills"]) == {question.skill for question in questions}


def test_vqav2_files_under_their_published_names(tmp_path):
    folder = write_vqa(tmp_path / "vqa")
    questions, gold = benchmark.read(TASKS["vqav2"], folder)
    assert [(q.id, q.images[0].name, q.skill, q.gold) for q in questions] == [
        (1, "COCO_val2014_000000000007.jpg", "color", "red"),
        (2, "COCO_val2014_000000000007.jpg", "count", "2"),
        (3, "COCO_val2014_000000000012.jpg", "color", "blue"),
    ]
    assert list(benchmark.read(TASKS["vqav2"], folder, limit=2)[1]) == [1, 2]
    file = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    assert benchmark.read(TASKS["vqav2"], file) == (questions, gold)


def test_broken_inputs_are_named(tmp_path):
    vqa, text, pope = TASKS["vqav2"], TASKS["text"], TASKS["pope"]
    with pytest.raises(TaskError, match="nowhere does not exist"):
        benchmark.read(vqa, tmp_path / "nowhere")
    with pytest.raises(TaskError, match=r"holds no file \*questions.json"):
        benchmark.read(vqa, tmp_path)
    folder = write_vqa(tmp_path / "vqa")
    (folder / "images" / "COCO_val2014_000000000012.jpg").rename(folder / "images" / "13.jpg")
    with pytest.raises(
        TaskError, match="1 images .* do not exist, such as .*COCO_val2014_000000000012.jpg"
    ):
        benchmark.read(vqa, folder)
    for name in ("coco_pope_random.json", "coco_pope_popular.json"):
        row = {"question_id": 1, "image": "1.jpg", "text": "is it?", "label": "no"}
        (tmp_path / name).write_text(json.dumps(row))
    with pytest.raises(TaskError, match="several files .* name one of them"):
        benchmark.read(pope, tmp_path)
    with pytest.raises(TaskError, match="1 images .* do not exist, such as .*1.jpg"):
        benchmark.read(pope, tmp_path / "coco_pope_random.json")
    file = tmp_path / "dialogues.json"
    file.write_text(json.dumps([{"id": 1, "conversations": [{"from": "human", "value": "a"}]}]))
    with pytest.raises(TaskError, match="dialogue 1 must be one question and its answer"):
        benchmark.read(text, file)
    file.write_text("{")
    with pytest.raises(TaskError, match="cannot be read"):
        benchmark.read(text, file)
    file.write_text('[{"question_id": 1, "answer": "a"}, {"question_id": 1, "answer": "b"}]')
    with pytest.raises(TaskError, match="repeat a question_id, such as 1"):
        benchmark.read_predictions(vqa, file)
    file.write_text('{"question_id": 1}\n')
    with pytest.raises(TaskError, match=r"'answer' is missing; it has 'question_id' \(line 1\)"):
        benchmark.read_predictions(vqa, file)
    with pytest.raises(TaskError, match="no scoring variant 'official'; known: none"):
        benchmark.score(text, {}, {}, "official")


class NamesColors:
    """A generator that answers with the image's colour, or the number of images seen."""

    seen: list = []

    def __init__(self, loaded):
        pass

    def generate(self, prompts, images, max_new_tokens, min_new_tokens):
        self.seen.append((prompts, images, max_new_tokens, min_new_tokens))
        answers = []
        for prompt, (image,) in zip(prompts, images, strict=True):
            red, _, blue = image.float().mean((1, 2)).tolist()
            color = "black" if red + blue < 9 else "red" if red > blue else "blue"
            answers.append("3" if "count" in prompt else color)
        return answers


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(runner, "Generator", NamesColors)
    monkeypatch.setattr(NamesColors, "seen", [])
    setup.initialize(ParallelConfig())
    config = ModelConfig(vision=VisionConfig(image_size=28))
    return type("Loaded", (), {"config": config})


def test_answers_are_not_scored_as_the_replies_of_a_judge(fake, tmp_path):
    settings = Settings(variant="judged")
    with pytest.raises(TaskError, match="judged scores a judge's replies, not answers"):
        runner.evaluate(fake, "hallusionbench", [], {}, tmp_path, settings, {})


def test_answers_belong_to_their_images(fake, tmp_path):
    questions, gold = benchmark.read(TASKS["vqav2"], write_vqa(tmp_path / "vqa"))
    settings = Settings(batch_size=2, suffix=" Short.")
    result = runner.evaluate(fake, "vqav2", questions, gold, tmp_path / "out", settings, {})
    rows = [json.loads(s) for s in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [(row["question_id"], row["answer"], row["score"]) for row in rows] == [
        (1, "red", 100.0),
        (2, "3", 0.0),
        (3, "blue", 100.0),
    ]
    assert rows[2]["gold"] == "blue" and rows[2]["images"][0].endswith("12.jpg")
    assert result["skills"]["color"]["accuracy"] == 100.0
    assert result["overall"]["accuracy"] == 66.67
    assert json.loads((tmp_path / "out/scores.json").read_text()) == result
    assert result["prompt_suffix"] == " Short." and result["variant"] == "owl2"
    (prompts, images, *limits), (last, _, *_) = NamesColors.seen
    assert prompts[0] == "USER: <|image|>what color? Short. ASSISTANT:" and len(last) == 1
    assert limits == [10, 1]
    assert images[0][0] is images[1][0]  # one image, so it will be encoded once
    fake.config.template = "vicuna_v1"
    result = runner.evaluate(fake, "vqav2", questions, gold, tmp_path / "out", settings, {})
    assert result["template"] == "vicuna_v1"
    assert NamesColors.seen[-1][0] == [questions[-1].prompt(" Short.", TEMPLATES["vicuna_v1"])]
    assert "tokenization" not in result  # so results that are there stay finished
    fake.config.template, fake.config.tokenization = "owl1", "official_train"
    result = runner.evaluate(fake, "vqav2", questions, gold, tmp_path / "out", settings, {})
    assert (result["template"], result["tokenization"]) == ("owl1", "official_train")
    asked = f"{questions[-1].text} Short.\nAI: "
    assert NamesColors.seen[-1][0][0].endswith(f"questions.\nHuman: <|image|>\nHuman: {asked}")


def test_images_are_resized_in_the_mode_of_the_model(fake, tmp_path):
    folder = write_vqa(tmp_path / "vqa")
    questions, gold = benchmark.read(TASKS["vqav2"], folder)
    Image.new("RGB", (60, 20), "red").save(questions[0].images[0])
    fake.config.image_mode, fake.config.image_mean = "pad", [0.0, 0.0, 1.0]
    runner.evaluate(fake, "vqav2", questions, gold, tmp_path / "out", Settings(), {})
    ((_, ((image,), *_), *_),) = NamesColors.seen
    assert image[:, 0, 0].tolist() == [0, 0, 255] and image[0, 14, 14] > 200


def test_blind_means_black_uint8_images(fake, tmp_path):
    questions, gold = benchmark.read(TASKS["vqav2"], write_vqa(tmp_path / "vqa"))
    settings = Settings(blind=True, max_new_tokens=4)
    result = runner.evaluate(fake, "vqav2", questions, gold, tmp_path / "out", settings, {})
    shown = [image for _, images, *_ in NamesColors.seen for (image,) in images]
    assert all(p.dtype == torch.uint8 and p.shape == (3, 28, 28) for p in shown)
    assert not any(p.any() for p in shown)
    assert result["blind"] and result["skills"]["color"]["accuracy"] == 0.0
    assert result["max_new_tokens"] == NamesColors.seen[0][2] == 4


def test_scores_do_not_outlive_their_predictions(fake, tmp_path):
    folder = write_vqa(tmp_path / "vqa\udce9")  # a name that is no text
    questions, gold = benchmark.read(TASKS["vqav2"], folder)
    arguments = (tmp_path / "out", Settings(), {})
    runner.evaluate(fake, "vqav2", questions, gold, *arguments)
    rows = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    assert (
        "vqa\udce9" in json.loads(rows[0])["images"][0] and (tmp_path / "out/scores.json").exists()
    )
    questions[2].images[0].write_bytes(b"no image")
    with pytest.raises(TaskError, match="the image of question 3"):
        runner.evaluate(fake, "vqav2", questions, gold, *arguments)
    assert not (tmp_path / "out/scores.json").exists()


def test_the_file_for_a_server_is_of_all_questions_of_this_evaluation(fake, tmp_path):
    folder, out = write_vqa(tmp_path / "vqa"), tmp_path / "out"
    questions, gold = benchmark.read(TASKS["vqav2"], folder)
    runner.evaluate(fake, "vqav2", questions, gold, out, Settings(), {})
    file = out / "submission_evalai.json"
    rows = [{"question_id": i, "answer": a} for i, a in ((1, "red"), (2, "3"), (3, "blue"))]
    assert json.loads(file.read_text()) == rows
    runner.evaluate(
        fake, "vqav2", *benchmark.read(TASKS["vqav2"], folder, 2), out, Settings(limit=2), {}
    )
    assert not file.exists()  # that of other predictions, and none of some questions
    out, file = tmp_path / "server", tmp_path / "server/submission_evalai.json"
    next(folder.glob("*annotations.json")).unlink()
    questions, gold = benchmark.read(TASKS["vqav2"], folder, with_gold=False)
    result = runner.evaluate(fake, "vqav2", questions, gold, out, Settings(), {})
    assert json.loads(file.read_text()) == rows
    assert "overall" not in result and json.loads((out / "scores.json").read_text()) == result
    row = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])
    assert (row["answer"], row["score"], row["gold"]) == ("red", None, None)


def test_answers_without_gold_do_not_replace_scores(fake, tmp_path):
    folder, out = write_vqa(tmp_path / "vqa"), tmp_path / "out"
    runner.evaluate(fake, "vqav2", *benchmark.read(TASKS["vqav2"], folder), out, Settings(), {})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    questions, gold = benchmark.read(TASKS["vqav2"], folder, with_gold=False)
    with pytest.raises(TaskError, match="out holds scores, .* name another --output, or .*restart"):
        runner.evaluate(fake, "vqav2", questions, gold, out, Settings(), {})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    again = Settings(restart=True)
    assert "overall" not in runner.evaluate(fake, "vqav2", questions, gold, out, again, {})
    assert "overall" not in runner.evaluate(fake, "vqav2", questions, gold, out, Settings(), {})


def test_a_rule_that_cannot_score_is_told_before_the_questions_are_asked(
    fake, tmp_path, monkeypatch
):
    rows = {1: "a.png", 2: "b.png"}
    (tmp_path / "images").mkdir()
    for name in rows.values():
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / name)
    content = {
        "images": [{"id": i, "file_name": name} for i, name in rows.items()],
        "annotations": [{"image_id": i, "id": i, "caption": "red"} for i in rows],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    questions, gold = benchmark.read(TASKS["coco_caption"], tmp_path)
    arguments = ("coco_caption", questions, gold, tmp_path / "out")
    before = runner.evaluate(fake, *arguments, Settings(), {})
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    for restart in (False, True):
        settings = Settings(variant="pycocoevalcap", restart=restart)
        with pytest.raises(TaskError, match=r"pip install 'megatron-owl2\[captions\]'"):
            runner.evaluate(fake, *arguments, settings, {})
    assert len(NamesColors.seen) == 1
    assert json.loads((tmp_path / "out/scores.json").read_text()) == before


@pytest.mark.parametrize("tag", ["<image>", "<|image|>"])
def test_a_tag_in_a_question_is_no_text(tmp_path, tag):
    row = {"question_id": 1, "image": "1.jpg", "text": f"{tag}\nis it?", "label": "no"}
    (tmp_path / "coco_pope_x.json").write_text(json.dumps(row))
    with pytest.raises(TaskError, match="question 1 holds .*, which stands for images only"):
        benchmark.read(TASKS["pope"], tmp_path)


def test_command_line_evaluates_and_scores(corpus, model, tmp_path, monkeypatch, capsys):
    data, output = corpus / "eval/seen", tmp_path / "out"
    options = ["--checkpoint", model, "--task", "vqav2", "--data", data, "--output", output]
    assert run_tool(monkeypatch, "evaluate", *options, "--limit", 9, "--prompt-suffix", "") == 0
    printed = capsys.readouterr().out
    written = json.loads((output / "scores.json").read_text())
    assert written["overall"]["n"] == 9 and written["prompt_suffix"] == "" and "all" in printed
    assert len((output / "predictions.jsonl").read_text().splitlines()) == 9
    gold = json.loads((data / "annotations.json").read_text())["annotations"][:9]
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": gold}))
    score = ["score", "--task", "vqav2", "--predictions", output / "predictions.jsonl", "--gold"]
    assert run_tool(monkeypatch, "evaluate", *score, tmp_path / "annotations.json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again == {key: written[key] for key in ("overall", "skills")}
    assert run_tool(monkeypatch, "evaluate", *score, data / "annotations.json") == 2
    assert "gold questions have no prediction" in capsys.readouterr().err
    assert run_tool(monkeypatch, "evaluate", *options, "--limit", 2, "--no-gold") == 2
    assert f"{output} holds scores, which" in capsys.readouterr().err
    options[-1] = output = tmp_path / "server"
    assert run_tool(monkeypatch, "evaluate", *options, "--limit", 2, "--no-gold") == 0
    assert f"2 answers to questions without gold are in {output}" in capsys.readouterr().out
    assert "overall" not in json.loads((output / "scores.json").read_text())
    long = ["--max-new-tokens", 600, "--limit", 2, "--batch-size", 1]
    assert run_tool(monkeypatch, "evaluate", *options, *long) == 2
    assert "(of the questions 1000 to 1000)" in capsys.readouterr().err
    options[1] = tmp_path
    assert run_tool(monkeypatch, "evaluate", *options) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("task", [["--task", "vqav2"], ["--task", "vqav2", "--task", "pope"]])
def test_scores_are_marked_by_the_checkpoint_that_answered(
    corpus, tmp_path, monkeypatch, capsys, task
):
    """A run that saves its next checkpoint while one is loaded."""
    run, tokenizer = tmp_path / "run", corpus / "tokenizer/tokenizer.model"
    other = build_model(tokenizer, tmp_path / "other", seed=2) / "checkpoints/iter_0000001"
    first = build_model(tokenizer, run) / "checkpoints/iter_0000001"
    shutil.copytree(other, run / "checkpoints/iter_0000002")
    data = corpus / "eval/seen"
    if len(task) > 2:
        for name in ("vqav2", "pope"):
            shutil.copytree(data, tmp_path / "data" / name)
        data = tmp_path / "data"

    def save_meanwhile(name: str):
        old = getattr(loading, name)

        def called(*arguments, **options):
            (run / "checkpoints/latest").write_text("iter_0000002")
            return old(*arguments, **options)

        monkeypatch.setattr(loading, name, called)

    def evaluate(checkpoint: Path, output: Path) -> dict:
        options = ["--checkpoint", checkpoint, *task, "--data", data, "--output", output]
        assert run_tool(monkeypatch, "evaluate", *options, "--limit", 4) == 0
        return json.loads(next(output.rglob("scores.json")).read_text())

    plain = evaluate(first, tmp_path / "first")
    assert "checkpoint" not in plain  # it has the name of the model
    for place in ("load_model", "load_tokenizer"):
        (run / "checkpoints/latest").write_text("iter_0000001")
        save_meanwhile(place)
        scores = evaluate(run, tmp_path / place)
        assert scores["checkpoint"] == "iter_0000001"
        assert scores["model_content"] == plain["model_content"] == mark_of_model(first)
        answers = next((tmp_path / place).rglob("predictions.jsonl")).read_bytes()
        assert answers == next((tmp_path / "first").rglob("predictions.jsonl")).read_bytes()
    scores = evaluate(run, tmp_path / "next")
    assert scores["checkpoint"] == "iter_0000002"
    assert scores["model_content"] == mark_of_model(other)


def test_the_name_of_a_checkpoint_is_no_setting(fake, tmp_path):
    """Evaluations that were finished before it was kept, or by another path, stay finished."""
    arguments = (*benchmark.read(TASKS["vqav2"], write_vqa(tmp_path / "vqa")), tmp_path / "out")
    first = runner.evaluate(fake, "vqav2", *arguments, Settings(), {"model": "run"})
    again = {"model": "run", "checkpoint": "iter_0000001"}
    assert runner.evaluate(fake, "vqav2", *arguments, Settings(), again) == first
    assert len(NamesColors.seen) == 1


def test_command_line_compares_likelihoods(corpus, model, tmp_path, monkeypatch, capsys):
    image = next((corpus / "eval/seen/images").iterdir())
    (tmp_path / "images").mkdir()
    (tmp_path / "images/i").write_bytes(image.read_bytes())
    texts = ["red", "a green circle .", "two", "blue"]
    row = {"question": "what color ?", "answer": "A", "data_type": "image", "data_id": "i"}
    row |= {"question_id": "1", "question_type_id": 1}
    row |= dict(zip(["choice_a", "choice_b", "choice_c", "choice_d"], texts, strict=True))
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"questions": [row]}))
    options = ["--checkpoint", model, "--task", "seed_bench", "--variant", "likelihood"]
    out = tmp_path / "out"
    assert run_tool(monkeypatch, "evaluate", *options, "--data", tmp_path, "--output", out) == 0
    said = json.loads((out / "predictions.jsonl").read_text())["prediction"]
    loaded = load_model(model)
    ids = [1, *loaded.tokenizer.encode("USER: "), -200]
    ids += loaded.tokenizer.encode("what color ? ASSISTANT:")
    endings = [[*loaded.tokenizer.encode(text), 2] for text in texts]
    pixels = images.load_square(image.read_bytes(), 28)
    found = Generator(loaded).log_likelihoods([ids] * 4, endings, [[pixels]] * 4)
    values = [one.total for one in found]
    assert len(set(values)) == 4 and said == "ABCD"[values.index(max(values))]
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "all"


def test_a_question_that_follows_another_is_asked_as_in_a_chat(
    corpus, model, tmp_path, monkeypatch
):
    (tmp_path / "images").mkdir()
    file = next((corpus / "eval/seen/images").iterdir())
    (tmp_path / "images/1.png").write_bytes(file.read_bytes())
    asked = ["what color ?", "how many ?", "where ?"]
    rows = [
        {"image": "1.png", "question_id": i, "question": text, "ability": "a", "category": category}
        for i, (text, category) in enumerate(
            zip(asked, (["single_turn", "multi_turn"], ["multi_turn"], ["multi_turn"]), strict=True)
        )
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--checkpoint", model, "--task", "owleval", "--no-gold", "--max-new-tokens", 6]
    out = tmp_path / "out"
    assert run_tool(monkeypatch, "evaluate", *options, "--data", tmp_path, "--output", out) == 0
    said = [json.loads(line)["answer"] for line in (out / "predictions.jsonl").open()]
    chat = api.load(str(model))
    messages: list = []
    for text, answer in zip(asked, said, strict=True):
        parts: list = [{"type": "text", "text": text}]
        if not messages:
            parts.insert(0, {"type": "image", "image": api.read_image(tmp_path / "images/1.png")})
        messages.append({"role": "user", "content": parts})
        assert chat.generate([messages], max_new_tokens=6) == [answer]
        messages.append({"role": "assistant", "content": answer})


def test_command_line_generates(corpus, model, monkeypatch, capsys):
    first, second = sorted((corpus / "eval/seen/images").iterdir())[:2]
    base = ["--checkpoint", model, "--max-new-tokens", 5]
    ask = ["--prompt", "what color is it ?"]
    answers = []
    for more in ([], ["--image", first], ["--image", first, "--image", second]):
        assert run_tool(monkeypatch, "generate", *base, *ask, *more) == 0
        answers.append(capsys.readouterr().out)
    assert all(answer.endswith("\n") for answer in answers)
    placed = ["--prompt", "what color is <|image|> ?", "--image", first]
    assert run_tool(monkeypatch, "generate", *base, *placed) == 0
    capsys.readouterr()
    for wrong, message in (
        ([*placed, "--image", second], "1 placeholders <|image|>, but 2 images"),
        ([*ask, "--image", "no.jpg"], "no.jpg"),
        ([*ask, "--image", corpus / "corpus.json"], "corpus.json: image cannot be decoded"),
        ([*ask, "--max-new-tokens", "600"], "ask for at most"),
    ):
        assert run_tool(monkeypatch, "generate", *base, *wrong) == 2
        assert message in capsys.readouterr().err
