"""Inference API: one question or many, images in every form, one code path with the command."""

import pytest
import torch
from exported import export, grouped_model
from hf_dirs import small_tokenizer
from PIL import Image
from tiny_data import make_image

import megatron_owl2
from megatron_owl2.cli import generate
from megatron_owl2.config.templates import OWL2, TEMPLATES
from megatron_owl2.data import images
from megatron_owl2.data.conversation import asking_ids, prompt
from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.api import InferenceModel, read_image
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import load_model

QUESTION = "badal bamer <|image|> dinap"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An HF export of a random model whose answers depend on what it is asked and shown."""
    folder = tmp_path_factory.mktemp("api")
    return export(grouped_model(), folder / "hf", tokenizer=small_tokenizer(folder))


@pytest.fixture(scope="module")
def model(directory) -> InferenceModel:
    return megatron_owl2.load(directory)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        make_image(number).save(path)
    return paths


def test_paths_pillow_images_and_tensors_give_the_same_answer(model, files):
    (path, *_) = files
    with Image.open(path) as opened:
        tensor = images.decode(path.read_bytes())
        assert tensor.shape == (3, 30, 40)  # not the model's size
        forms = [str(path), path, opened, tensor]
        answers = {model.generate(QUESTION, [form], max_new_tokens=12) for form in forms}
    pixels = images.resize_square(tensor, model.config.vision.image_size)
    assert answers == set(engine(model, [QUESTION], [[pixels]]))
    assert len({model.generate(QUESTION, [f], max_new_tokens=12) for f in files}) > 1


def test_images_are_resized_in_the_mode_of_the_model(tmp_path):
    model = grouped_model()
    model.model.image_mode = "pad"
    exported = export(model, tmp_path / "hf", tokenizer=small_tokenizer(tmp_path))
    loaded = megatron_owl2.load(exported)
    assert loaded.config.image_mode == "pad"
    tensor = images.from_pillow(make_image(3, 90, 20))
    size, answers = loaded.config.vision.image_size, []
    for mode in ("stretch", "pad"):
        pixels = images.SquareResize(mode, tuple(loaded.config.image_mean))(tensor, size)
        answers += engine(loaded, [QUESTION], [[pixels]])
    assert loaded.generate(QUESTION, [tensor], max_new_tokens=12) == answers[1] != answers[0]


def engine(model: InferenceModel, questions, pixels) -> list[str]:
    """What the engine answers to questions with placeholders and images of the model's size."""
    return model.generator.generate([prompt(q) for q in questions], pixels, 12)


def test_placeholders_come_first_unless_the_question_has_them(model, files):
    size = model.config.vision.image_size
    pixels = [images.resize_square(read_image(file), size) for file in files[:2]]
    assert [model.generate("badal", files[:2], max_new_tokens=12)] == engine(
        model, ["<|image|><|image|>badal"], [pixels]
    )
    assert [model.generate("badal", max_new_tokens=12)] == engine(model, ["badal"], [[]])


def test_a_list_of_questions_is_answered_as_one_by_one(model, files):
    questions = ["badal bamer", QUESTION, "kunat"]
    shown = [[], files[:1], files[1:]]
    together = model.generate(questions, shown, max_new_tokens=12)
    assert together == [
        model.generate(question, row, max_new_tokens=12)
        for question, row in zip(questions, shown, strict=True)
    ]
    assert len(set(together)) == 3
    assert model.generate(["badal", "kunat"], max_new_tokens=12) == [
        model.generate(question, max_new_tokens=12) for question in ("badal", "kunat")
    ]
    assert model.generate([]) == []


def test_half_of_a_character_is_refused_wherever_it_stands(model):
    whole, half = {"role": "user", "content": "a"}, "hi \ud800"
    ask = [
        half,
        [{"role": "system", "content": half}, whole],
        [whole, {"role": "assistant", "content": half}, whole],
    ]
    for question in ask:
        with pytest.raises(InferenceError, match=r"a text holds '\\ud800', half of a character"):
            model.generate([question])


def test_answers_have_at_most_so_many_tokens(model):
    short = model.generate("badal", max_new_tokens=1)
    assert len(model.tokenizer.encode(short)) <= 2
    with pytest.raises(InferenceError, match="max_new_tokens is 0"):
        model.generate("badal", max_new_tokens=0)


def test_without_images_a_placeholder_is_text(model):
    text = "badal <|image|> dinap</s>"
    ids = asking_ids([[text]], [], model.tokenizer)
    assert -200 not in ids and model.tokenizer.eos_id not in ids
    expected = model.generator.generate([ids], [[]], 12)
    assert model.generate([text], max_new_tokens=12) == expected


def test_messages_are_continued(model, files):
    size = model.config.vision.image_size
    pixels = [images.resize_square(read_image(file), size) for file in files[:2]]
    first, second = ({"type": "image", "image": file} for file in files[:2])
    messages = [
        {"role": "system", "content": "kunat"},
        {"role": "user", "content": [first, {"type": "text", "text": "badal"}]},
        {"role": "assistant", "content": "bamer</s>"},
        {"role": "user", "content": [{"type": "text", "text": "<|image|> "}, second]},
    ]
    questions = [["", "badal"], ["<|image|> ", ""]]
    ids = asking_ids(questions, ["bamer</s>"], model.tokenizer, OWL2, "kunat")
    assert ids.count(-200) == 2 and ids.count(model.tokenizer.eos_id) == 1
    expected = model.generator.generate([ids], [pixels], 12)
    assert model.generate([messages, "badal"], max_new_tokens=12) == [
        *expected,
        model.generate("badal", max_new_tokens=12),
    ]


def test_messages_that_are_no_conversation_are_refused(model, files):
    user, assistant = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    shown = {"role": "assistant", "content": [{"type": "image", "image": files[0]}]}
    for messages, message in (
        ([user, assistant], "the last message must be the user's"),
        ([], "the last message must be the user's"),
        ([user, user], "message 2 has the role 'user'"),
        ([assistant, user], "message 1 has the role 'assistant'"),
        ([user, {"role": "system", "content": "x"}], "message 2 has the role 'system'"),
        ([{"from": "human", "value": "x"}], "the content of message 1 must be a text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "with an 'image'"),
        ([{"role": "user", "content": " "}], "message 1 is empty"),
        ([user, {"role": "assistant", "content": ""}, user], "message 2 is empty"),
        ([user, shown, user], "message 2 has an image, which only the user may show"),
    ):
        with pytest.raises(InferenceError, match=message):
            model.generate([messages])
    with pytest.raises(InferenceError, match=r"generate\(\[messages\]\)"):
        model.generate([user])
    with pytest.raises(InferenceError, match="messages have their images in them"):
        model.generate([[user]], [files[:1]])


def test_a_model_is_asked_in_its_template(tmp_path, files):
    trained = grouped_model()
    trained.model.template = "vicuna_v1"
    trained.model.decoder.max_positions = 256  # of rotary positions, which are in no weight
    folder = export(trained, tmp_path / "hf", tokenizer=small_tokenizer(tmp_path))
    model = megatron_owl2.load(folder)
    pixels = images.resize_square(read_image(files[0]), model.config.vision.image_size)
    text = prompt("<|image|>badal", TEMPLATES["vicuna_v1"])
    assert "<|image|>\nbadal" in text and text.startswith("A chat between")
    expected = model.generator.generate([text], [[pixels]], 12)
    assert [model.generate("badal", files[:1], max_new_tokens=12)] == expected
    assert expected != engine(model, ["<|image|>badal"], [[pixels]])


def test_what_cannot_be_shown_is_refused(model, files, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for shown, message in (
        ([tmp_path / "text.jpg"], "text.jpg: image cannot be decoded"),
        ([torch.zeros(3, 28, 28)], r"tensor torch.float32 \[3, 28, 28\]; give uint8 \[3, H, W\]"),
        ([torch.zeros(28, 28, 3, dtype=torch.uint8)], r"\[28, 28, 3\]; give uint8"),
        ([Image.new("F", (8, 8))], "an image: image of 32-bit numbers"),
        (str(files[0]), r"are a list: images=\[image\]"),
        (files, "1 placeholders <|image|>, but 3 images"),
    ):
        with pytest.raises(InferenceError, match=message.replace("|", r"\|")):
            model.generate(QUESTION, shown)
    with pytest.raises(FileNotFoundError, match=r"no\.jpg"):
        model.generate("badal", ["no.jpg"])
    for name in ("a\0b.png", "\ud800.png"):
        with pytest.raises(InferenceError, match=r"\.png: "):
            model.generate(QUESTION, [name])
    with pytest.raises(InferenceError, match="2 prompts, but images for 1"):
        model.generate(["badal", "kunat"], [files[:1]])


def test_the_command_gives_the_answer_of_the_api(model, directory, files, capsys):
    options = ["--checkpoint", str(directory), "--prompt", "badal", "--max-new-tokens", "12"]
    for file in files[:2]:
        options += ["--image", str(file)]
    assert generate.main(options, "owl2 generate") == 0
    assert capsys.readouterr().out == model.generate("badal", files[:2], max_new_tokens=12) + "\n"


def test_loading_is_the_engines(directory, tmp_path):
    loaded = megatron_owl2.load(str(directory), precision="bf16")
    assert isinstance(loaded, megatron_owl2.InferenceModel)
    reference = Generator(load_model(directory, "bf16"))
    assert [loaded.generate("badal", max_new_tokens=12)] == reference.generate(
        [prompt("badal")], [[]], 12
    )
    for precision in ("fp16", "FP32"):
        with pytest.raises(InferenceError, match=f"precision is '{precision}'; use fp32 or bf16"):
            megatron_owl2.load(directory, precision)
    with pytest.raises(megatron_owl2.Owl2Error, match="is not a directory"):
        megatron_owl2.load(tmp_path / "no")
