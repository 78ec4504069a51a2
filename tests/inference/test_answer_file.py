"""Files of requests: answers in order, going on after a kill, and errors with their line."""

import json
import shutil
import subprocess
from pathlib import Path

import processes
import pytest
from evaluations import build_model
from exported import export, grouped_model
from hf_dirs import small_tokenizer
from tiny_data import make_image

import megatron_owl2
from megatron_owl2.cli import generate, visualize_attention
from megatron_owl2.inference import api
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.request_file import answer_file

HALF = [{"role": "user", "content": "\ud800"}]
WORDS = ("badal", "bamer", "dinap", "kunat", "gosel", "fitan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, images, and a file of requests of every kind."""
    folder = tmp_path_factory.mktemp("requests")
    export(grouped_model(), folder / "hf", tokenizer=small_tokenizer(folder))
    (folder / "images").mkdir()
    for number in range(3):
        make_image(number).save(folder / "images" / f"{number}.png")
    rows = [
        {
            "id": n,
            "prompt": word,
            "images": [f"images/{n % 3}.png"],
            "max_new_tokens": 2 + 5 * n % 9,
        }
        for n, word in enumerate(WORDS)
    ]
    shown = {"type": "image", "image": "images/1.png"}
    talk = [
        {"role": "user", "content": [shown, {"type": "text", "text": "badal"}]},
        {"role": "assistant", "content": "bamer"},
        {"role": "user", "content": "kunat"},
    ]
    frames = ["images/0.png", "images/1.png"]
    rows += [
        {"id": "talk", "messages": talk, "logprobs": True},
        {"id": "beams", "prompt": "dinap", "beams": 3},
        {"id": "drawn", "prompt": "dinap", "temperature": 1.0, "seed": 4, "stop": "a"},
        {"id": "video", "prompt": "x <|image|> y", "images": [frames], "system": "kunat"},
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(folder: Path, output: Path, *more: str) -> list[str]:
    options = ["--checkpoint", folder / "hf", "--requests", folder / "requests.jsonl"]
    options += ["--output", output, "--max-new-tokens", "12", "--batch-size", "3", *more]
    return [*map(str, options)]


@pytest.fixture(scope="module")
def answers(folder):
    """The lines of the file of answers."""
    assert generate.main(command(folder, folder / "answers.jsonl"), "owl2 generate") == 0
    return (folder / "answers.jsonl").read_text().splitlines(keepends=True)


def test_answers_are_those_of_single_questions_in_the_order_of_the_file(folder, answers):
    rows = [json.loads(line) for line in answers]
    assert [row["id"] for row in rows] == [*range(6), "talk", "beams", "drawn", "video"]
    model, by_id = megatron_owl2.load(folder / "hf"), {row["id"]: row for row in rows}
    images = [folder / "images" / f"{n}.png" for n in range(3)]
    for n, word in enumerate(WORDS):
        limit = 2 + 5 * n % 9
        alone = model.generate(word, [images[n % 3]], max_new_tokens=limit)
        assert by_id[n]["answer"] == alone and by_id[n]["new_tokens"] <= limit
    assert by_id["beams"]["answer"] == model.generate("dinap", max_new_tokens=12, beams=3)
    drawn = {"max_new_tokens": 12, "temperature": 1.0, "seed": 4, "stop": ["a"]}
    assert by_id["drawn"]["answer"] == model.generate("dinap", **drawn)
    assert len(by_id["talk"]["logprobs"]) == by_id["talk"]["new_tokens"]
    frames = {"type": "image", "image": images[:2]}
    text = [{"type": "text", "text": part} for part in ("x ", " y")]
    messages = [
        {"role": "system", "content": "kunat"},
        {"role": "user", "content": [text[0], frames, text[1]]},
    ]
    assert by_id["video"]["answer"] == model.generate([messages], max_new_tokens=12)[0]
    assert len({row["answer"] for row in rows}) > 5
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}


def test_an_interrupted_file_goes_on(folder, answers, tmp_path, capsys, monkeypatch):
    output = tmp_path / "new" / "answers.jsonl"
    output.parent.mkdir()
    output.write_text("".join([answers[7], answers[2], answers[4][:-9]]))  # as they ended, one torn
    asked = []
    original = megatron_owl2.InferenceModel.pixels
    monkeypatch.setattr(
        megatron_owl2.InferenceModel,
        "pixels",
        lambda model, image: asked.append(image) or original(model, image),
    )
    assert generate.main(command(folder, output), "owl2 generate") == 0
    assert "8 of 10 requests answered now" in capsys.readouterr().out
    assert output.read_text() == "".join(answers) and asked
    asked.clear()
    assert generate.main(command(folder, output), "owl2 generate") == 0
    assert "0 of 10 requests answered now" in capsys.readouterr().out and not asked
    assert output.read_text() == "".join(answers)


def test_answers_are_marked_by_the_checkpoint_that_gave_them(tmp_path, capsys, monkeypatch):
    """A run that saves its next checkpoint before the one that was named is loaded."""
    run, tokenizer = tmp_path / "run", small_tokenizer(tmp_path)
    first = build_model(tokenizer, run) / "checkpoints/iter_0000001"
    other = build_model(tokenizer, tmp_path / "other", seed=2) / "checkpoints/iter_0000001"
    shutil.copytree(other, run / "checkpoints/iter_0000002")
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text(json.dumps({"id": 1, "prompt": "badal"}) + "\n")
    load = api.load

    def save_and_load(*arguments, **options):
        (run / "checkpoints/latest").write_text("iter_0000002")
        return load(*arguments, **options)

    monkeypatch.setattr(api, "load", save_and_load)
    rest = ["--requests", requests, "--output", output, "--max-new-tokens", 9]
    assert generate.main([*map(str, ["--checkpoint", run, *rest])], "owl2 generate") == 0
    (answer,) = map(json.loads, output.read_text().splitlines())
    assert answer["answer"] == load(first).generate("badal", max_new_tokens=9)
    assert generate.main([*map(str, ["--checkpoint", first, *rest])], "owl2 generate") == 0
    assert "0 of 1 requests answered now" in capsys.readouterr().out
    assert generate.main([*map(str, ["--checkpoint", run, *rest])], "owl2 generate") == 2
    assert "line 1 answers 1 as it was asked before" in capsys.readouterr().err


def test_answers_of_something_else_are_refused(folder, answers, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    unknown = json.dumps({"id": "x", "answer": "", "request": ""}) + "\n"
    for lines, more, told in (
        ([answers[1]], ["--length-penalty", "0.5"], "line 1 answers 1 as it was asked before"),
        ([answers[1]], ["--precision", "bf16"], "line 1 answers 1 as it was asked before"),
        ([answers[1], answers[1]], [], "line 2 answers 1 again"),
        ([unknown], [], "line 1 answers 'x', which is no request"),
        (['{"id": 1}\n'], [], "line 1 is no answer"),
        ([answers[1], "{\n"], [], "line 2: "),
    ):
        output.write_text("".join(lines))
        assert generate.main(command(folder, output, *more), "owl2 generate") == 2
        error = capsys.readouterr().err
        assert f"{output}, {told}" in error and output.read_text() == "".join(lines)
    output.write_text("")
    with answer_file(output):
        assert generate.main(command(folder, output), "owl2 generate") == 2
    assert "another process writes" in capsys.readouterr().err


def test_an_output_that_is_a_link_stays_one(folder, answers, tmp_path):
    real, output = tmp_path / "real.jsonl", tmp_path / "answers.jsonl"
    real.write_text("".join([answers[7], answers[2]]))  # not in the order of the requests
    output.symlink_to(real)
    assert generate.main(command(folder, output), "owl2 generate") == 0
    assert output.is_symlink() and real.read_text() == "".join(answers)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "x"}, "'id' is None; it must be a text or a whole number"),
        ({"id": True, "prompt": "x"}, "'id' is True"),
        ({"id": "a", "prompt": "x"}, "the id 'a' is also that of "),
        ({"id": 1}, "give either 'prompt' or 'messages'"),
        ({"id": 1, "prompt": "x", "messages": []}, "give either 'prompt' or 'messages'"),
        ({"id": 1, "prompt": 7}, "'prompt' is 7; it must be a text"),
        ({"id": 1, "messages": "x"}, "'messages' must be a list"),
        ({"id": 1, "messages": []}, "the last message must be the user's"),
        ({"id": 1, "messages": [], "images": ["x"]}, "'messages' have their images"),
        ({"id": 1, "prompt": "x", "images": "0.png"}, "'images' must be a list of paths"),
        ({"id": 1, "prompt": "x", "images": ["gone.png"]}, "there is no image "),
        ({"id": 1, "prompt": "x", "images": [{}]}, "an image is {}; it must be a path"),
        ({"id": 1, "prompt": "x", "images": [[]]}, "a video is a list of frames"),
        ({"id": 1, "prompt": "x", "imagse": []}, "there is no field 'imagse'; did"),
        ({"id": 1, "prompt": "x", "top_k": 1.5}, "'top_k' is 1.5; it must be a whole number"),
        ({"id": 1, "prompt": "x", "top_p": "1"}, "'top_p' is '1'; it must be a number"),
        ({"id": 1, "prompt": "x", "top_p": 2}, "top_p is 2; it must be above 0"),
        ({"id": 1, "prompt": "x", "logprobs": 1}, "'logprobs' is 1; it must be true or false"),
        ({"id": 1, "prompt": "x", "stop": 1}, "'stop' is 1; it must be a text"),
        ({"id": 1, "prompt": "x", "system": 1}, "'system' is 1; it must be a text"),
        ({"id": 1, "prompt": "x", "temperature": 10**400}, "temperature is 1000"),
        ({"id": 1, "prompt": "x", "repetition_penalty": 10**400}, "repetition_penalty is 1000"),
        ({"id": 1, "prompt": "x", "beams": 10**400}, "beams is 1000"),
        ({"id": 1, "prompt": "\ud800"}, r"a text holds '\ud800', half of a character"),
        ({"id": 1, "prompt": "x", "system": "\ud800"}, r"a text holds '\ud800', half of a"),
        ({"id": 1, "messages": HALF}, r"a text holds '\ud800', half of a character"),
        (["x"], "it is no object"),
    ],
)
def test_errors_of_a_request_name_file_and_line(folder, row, told, tmp_path, capsys):
    path, output = tmp_path / "r.jsonl", tmp_path / "o.jsonl"
    path.write_text('{"id": "a", "prompt": "x"}\n\n' + json.dumps(row))
    options = ["--checkpoint", str(folder / "hf"), "--requests", str(path), "--output", str(output)]
    assert generate.main(options, "owl2 generate") == 2
    assert capsys.readouterr().err.startswith(f"error: {path}, line 3: {told}")
    assert not output.exists()


def test_what_does_not_fit_or_cannot_be_read_is_told_with_its_line(folder, tmp_path, capsys):
    path, output = tmp_path / "r.jsonl", tmp_path / "o.jsonl"
    options = ["--checkpoint", str(folder / "hf"), "--requests", str(path), "--output", str(output)]
    path.write_text('{"id": 1, "prompt": "x"}\n{"id": 2, "prompt": "x", "max_new_tokens": 99}\n')
    assert generate.main(options, "owl2 generate") == 2
    assert f"{path}, line 2 takes" in capsys.readouterr().err and not output.exists()
    (tmp_path / "no.png").write_text("no image")
    rows = [{"id": 1, "prompt": "x"}, {"id": 2, "prompt": "x", "images": ["no.png"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert generate.main([*options, "--batch-size", "1"], "owl2 generate") == 2
    assert f"{path}, line 2: {tmp_path}/no.png: image cannot be" in capsys.readouterr().err
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [1]
    path.write_text("")
    assert generate.main(options, "owl2 generate") == 2
    assert "r.jsonl holds no requests" in capsys.readouterr().err
    options[-1] = str(path)
    path.write_text('{"id": 1, "prompt": "x"}\n')
    assert generate.main(options, "owl2 generate") == 2
    assert "is the file of the requests" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--requests", "x"], "give --requests and --output together"),
        (["--prompt", "x", "--output", "x"], "give --requests and --output together"),
        (["--chat", "--image", "x"], "--image and --video are of --prompt"),
        (["--chat", "--beams", "2"], "--beams cannot stream"),
        (["--prompt", "x", "--logprobs"], "--logprobs is of --requests"),
        (["--prompt", "x", "--chat"], "not allowed with argument"),
        ([], "one of the arguments --prompt --requests --chat is required"),
    ],
)
def test_options_that_do_not_go_together(more, told, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--checkpoint", "x", *more], "owl2 generate")
    assert told in capsys.readouterr().err


def test_every_generation_option_is_a_flag():
    given = {
        "max_new_tokens": 5, "min_new_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 3,
        "repetition_penalty": 1.5, "stop": ["a", "b"], "seed": 7, "beams": 1, "length_penalty": 0.5,
        "logprobs": True,
    }  # fmt: skip
    assert given.keys() == GenerationOptions.__dataclass_fields__.keys()
    words = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list) else [value]
        words += [flag] if value is True else [w for v in values for w in (flag, str(v))]
    parser = generate.Command(
        verb="x", help="", add_arguments=generate.add_arguments, run=lambda options: 0
    ).parser("x")
    parsed = parser.parse_args(["--checkpoint", "x", "--chat", *words])
    assert generate.given_options(parsed) == given


@pytest.mark.distributed
def test_ranks_work_together(folder, answers, tmp_path):
    """One launch of two ranks that split the model: the file, an image that cannot be read, one
    question, attention maps."""
    program = Path(__file__).parents[1] / "helpers" / "generation_ranks.py"
    done: subprocess.CompletedProcess = processes.run_ranks(2, program, folder, tmp_path)
    assert done.returncode == 0, done.stderr
    texts = [json.loads(line)["answer"] for line in answers]
    rows = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(row)["answer"] for row in rows] == texts
    one = megatron_owl2.load(folder / "hf").generate("badal", max_new_tokens=12)
    assert done.stdout.splitlines().count(one) == 1
    shown = ["--image", str(folder / "images/0.png"), "--output", str(tmp_path / "alone")]
    alone = ["--checkpoint", str(folder / "hf"), "--prompt", "badal", *shown]
    assert visualize_attention.main(alone, "owl2 visualize-attention") == 0
    of_ranks, of_one = (
        json.loads((tmp_path / name / "attention.json").read_text())[0]
        for name in ("attention", "alone")
    )
    assert of_ranks["answer"] == of_one["answer"]
    for split, whole in zip(of_ranks["layers"], of_one["layers"], strict=True):
        assert split == pytest.approx(whole, abs=1e-5)
    assert "line 1: " in done.stderr and "no.png" in done.stderr
