"""The processor, tokenizer and image processor of an exported directory, against our own inputs."""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import export, grouped_model, load, offline
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessor,
)

from megatron_owl2.data.conversation import build_sample, prompt, prompt_ids
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.data.images import decode, resize_square
from megatron_owl2.data.shards.records import Record, Turn
from megatron_owl2.data.tokenizer import Tokenizer, train_tokenizer
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import LoadedModel

pytestmark = pytest.mark.slow

ROWS = 5  # of an image
TEXTS = [
    "what color is the top one ? red blue",
    "Zebra, quixotic; an UNSEEN word-like thing!",
    "12 345.6 7e8",
    "a\nb\n\n\tc\r\n",
    "naïve café 日本語 🦉 ﬁ ½ e\u0301\u200b",
    " leading",
    "   many  spaces   inside and behind   ",
    " ",
    "",
    "</s>",
    "<s>a</s>b<unk>",
    "<0x0A> \u2581the",
]


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    # With pieces that would merge to "</s>", were it not a special one.
    texts = [f"what color is the {w} one ? red blue green {w}" for w in ("top", "left", "right")]
    texts += ["USER: ASSISTANT: </ s> </ s> <s> <unk>"] * 9
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(texts, path, vocab_size=320)


@pytest.fixture(scope="module")
def ours():
    return grouped_model()


@pytest.fixture(scope="module")
def directory(ours, tokenizer, tmp_path_factory) -> Path:
    return export(ours, tmp_path_factory.mktemp("export") / "owl", tokenizer.path)


@pytest.fixture(scope="module")
def processor(directory):
    return AutoProcessor.from_pretrained(directory, trust_remote_code=True)


def draw_image(seed: int, size: tuple[int, int] = (40, 31), mode: str = "RGB") -> Image.Image:
    """A smooth image with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 4), dtype=np.uint8), "RGBA")
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
    noisy = (pixels + rng.integers(-9, 10, pixels.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(noisy, "RGBA").convert(mode)


def encoded(image: Image.Image, kind: str) -> bytes:
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def expected_row(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids with 0 at the rows of images, and the modality."""
    ids, modality = [], []
    for i in prompt_ids(text, tokenizer):
        ids += [0] * ROWS if i == IMAGE_TOKEN_ID else [i]
        modality += [1] * ROWS if i == IMAGE_TOKEN_ID else [0]
    return ids, modality


def test_the_tokenizer_gives_our_ids_and_our_text(directory, tokenizer):
    theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    assert len(theirs) == theirs.vocab_size == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs.pad_token_id == 0 and theirs.model_max_length == 96
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert theirs(text)["input_ids"] == [1, *ids], text
        for skip in (True, False):
            special = [1, *ids, 2, 0, *ids]
            assert theirs.decode(special, skip_special_tokens=skip) == tokenizer.decode(
                special, skip_special=skip
            )
    assert theirs("a </s> <|image|> b")["input_ids"].count(2) == 0


def test_ids_are_those_of_prompt_ids(processor, tokenizer):
    pieces = ["", " ", "hello\nyou", "  é 日本 ", "USER: what color "]
    image = draw_image(0)
    for n in range(4):
        for parts in itertools.product(pieces, repeat=n + 1):
            text = "<|image|>".join(parts)
            if not text:
                continue  # refused, as test_mistakes_are_named has it
            inputs = processor(text=text, images=[image] * n)
            ids, modality = expected_row(text, tokenizer)
            assert inputs["input_ids"].tolist() == [ids], text
            assert inputs["modality"].tolist() == [modality], text
            assert inputs["attention_mask"].tolist() == [[1] * len(ids)], text
            assert len(inputs.get("pixel_values", [])) == n


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_and_keeps_its_images_in_order(processor, tokenizer, side):
    texts = ["hello", "<|image|>what <|image|>", "the <|image|> one", "a long text without one"]
    originals = [draw_image(i) for i in range(3)]
    options = {} if side == "left" else {"padding_side": "right"}
    inputs = processor(text=texts, images=originals, padding=True, return_tensors="pt", **options)
    rows = [expected_row(text, tokenizer) for text in texts]
    length = max(len(ids) for ids, _ in rows)
    for i, (ids, modality) in enumerate(rows):
        where = slice(length - len(ids), None) if side == "left" else slice(None, len(ids))
        for name, own in (
            ("input_ids", ids),
            ("modality", modality),
            ("attention_mask", [1] * len(ids)),
        ):
            wanted = torch.zeros(length, dtype=torch.int64)
            wanted[where] = torch.tensor(own)
            assert torch.equal(inputs[name][i], wanted)
    alone = [processor(text="<|image|>", images=p)["pixel_values"] for p in originals]
    assert torch.equal(inputs["pixel_values"], torch.cat(alone))
    nested = processor(text=texts, images=[[], originals[:2], originals[2:], []], **options)
    assert nested.keys() == inputs.keys()
    assert all(torch.equal(nested[key], inputs[key]) for key in inputs)


def test_frames_share_a_placeholder(processor):
    frames = [draw_image(i) for i in range(4)]
    text = "what <|image|> color <|image|>"
    inputs = processor(text=text, images=[frames[:3], frames[3]])
    separate = processor(text="<|image|>" * 4, images=frames)
    assert inputs["modality"].sum() == 4 * ROWS
    assert torch.equal(inputs["pixel_values"], separate["pixel_values"])
    first = inputs["modality"][0].tolist()
    start = first.index(1)
    assert first[start : start + 3 * ROWS] == [1] * 3 * ROWS and first[start + 3 * ROWS] == 0
    nested = processor(text=["<|image|>", text], images=[frames[:2], [frames[0], frames[1:]]])
    assert nested["modality"].sum(1).tolist() == [2 * ROWS, 4 * ROWS]


def test_mistakes_are_named(processor):
    with pytest.raises(ValueError, match="2 placeholders .*, but 1 images"):
        processor(text="<|image|><|image|>", images=[draw_image(0)])
    with pytest.raises(ValueError, match="0 placeholders .*, but 2 images"):
        processor(text="hello", images=[draw_image(0)] * 2)
    with pytest.raises(ValueError, match="1 placeholders .*, but 2 images"):
        processor(text="hello <|image|>", images=[draw_image(0)] * 2)
    with pytest.raises(ValueError, match="neither videos nor audio"):
        processor(text="hello", videos=[draw_image(0)])
    for empty in (None, []):
        with pytest.raises(ValueError, match="give text"):
            processor(text=empty)
    with pytest.raises(ValueError, match=r"torch.float32 \[3, 9, 9\]; give a PIL image or uint8"):
        processor(text="<|image|>", images=torch.zeros(3, 9, 9))


@pytest.mark.parametrize("size", [(40, 31), (28, 28), (11, 200), (640, 480)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16"])
def test_pixel_values_are_ours(directory, ours, size, mode):
    theirs = AutoImageProcessor.from_pretrained(directory, trust_remote_code=True)
    image = draw_image(1, size, "RGBA")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 251)
    data = encoded(image.convert(mode) if mode != "I;16" else image, "PNG")
    square = resize_square(decode(data), 28)
    wanted = (square.float() / 255 - ours.image_mean) / ours.image_std
    opened = Image.open(io.BytesIO(data))
    values = theirs(opened)["pixel_values"]
    torch.testing.assert_close(values, wanted[None], atol=1e-6, rtol=0)
    if mode == "RGB":
        array = np.asarray(opened)
        for same in (array, array.transpose(2, 0, 1), torch.tensor(array)):
            assert torch.equal(theirs([same], return_tensors="pt")["pixel_values"], values)


def test_a_jpeg_is_decoded_as_ours_is(directory, ours, tmp_path):
    theirs = AutoImageProcessor.from_pretrained(directory, trust_remote_code=True)
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded(draw_image(2, (200, 150)), "JPEG"))
    square = resize_square(decode(path.read_bytes()), 28).float() / 255
    wanted = (square - ours.image_mean) / ours.image_std
    torch.testing.assert_close(theirs(str(path))["pixel_values"][0], wanted, atol=1e-6, rtol=0)


def test_the_chat_template_is_the_official_prompt(processor, tokenizer):
    image = draw_image(0)
    question = [{"type": "image", "image": image}, {"type": "text", "text": "what color ?"}]
    messages = [{"role": "user", "content": question}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == prompt("<|image|>what color ?") == "USER: <|image|>what color ? ASSISTANT:"
    inputs = processor.apply_chat_template(
        [messages, [{"role": "user", "content": "hello"}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    wanted = processor(text=[text, prompt("hello")], images=[image])
    assert isinstance(inputs, BatchFeature) and inputs.keys() == wanted.keys()
    assert all(torch.equal(inputs[key], wanted[key]) for key in wanted)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    text = processor.apply_chat_template(system, add_generation_prompt=True)
    assert text == "Be brief. USER: hello ASSISTANT:"


def test_a_conversation_has_the_ids_of_training(processor, tokenizer):
    turns = [Turn("what color is the top one ?", "red"), Turn("and the left one", "blue green")]
    record = Record(key="k", images=(b"",), caption=None, turns=turns)
    sample = build_sample(record, tokenizer, ROWS, 96)
    messages = []
    for i, turn in enumerate(turns):
        image = [{"type": "image", "image": draw_image(0)}] if i == 0 else []
        content = [*image, {"type": "text", "text": turn.question}]
        messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]},
        ]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert inputs["input_ids"][0].tolist() == sample.tokens[: sample.length].tolist()
    assert inputs["modality"][0].tolist() == sample.modality[: sample.length].tolist()


def test_answers_are_those_of_our_generator(processor, directory, ours, tokenizer):
    questions = ["what color is the <|image|> one ?", "hello", "<|image|>red or <|image|>"]
    prompts = [prompt(question) for question in questions]
    originals = [draw_image(i, (60, 50)) for i in range(3)]
    squares = [resize_square(decode(encoded(image, "PNG")), 28) for image in originals]
    loaded = LoadedModel(ours, ours.model, tokenizer)
    wanted = Generator(loaded).generate(prompts, [squares[:1], [], squares[1:]], 12)
    inputs = processor(text=prompts, images=originals)
    out = load(directory).generate(**inputs, max_new_tokens=12, min_new_tokens=1)
    new = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.strip() for answer in new] == wanted
    assert len(set(wanted)) == 3


def test_a_saved_processor_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    texts = [*(text for text in TEXTS if text), "the <|image|> one"]
    before, after = (p(text=texts, images=draw_image(3)) for p in (processor, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.chat_template == processor.chat_template
    assert (tmp_path / "saved" / "tokenizer.model").is_file()


def test_without_trust_the_settings_are_those_of_the_official_classes(directory, ours):
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "CLIPImageProcessor"
    clip = AutoImageProcessor.from_pretrained(directory, trust_remote_code=False)
    assert isinstance(clip, CLIPImageProcessor) and type(clip).__module__.startswith(
        "transformers."
    )
    values = clip(Image.new("RGB", (60, 60), (255, 0, 51)), return_tensors="pt")["pixel_values"]
    wanted = (torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1) - ours.image_mean) / ours.image_std
    torch.testing.assert_close(values[0], wanted.expand(-1, 28, 28), atol=1e-5, rtol=0)
    tree = json.loads((directory / "tokenizer_config.json").read_text())
    assert tree["tokenizer_class"] == "LlamaTokenizer"


def test_nothing_but_transformers_is_needed(directory, tmp_path):
    """In a process that has neither this project nor torchvision and einops."""
    code = f"""
import sys
for name in ("megatron_owl2", "megatron", "torchvision", "einops"):
    sys.modules[name] = None
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
where = {str(directory)!r}
processor = AutoProcessor.from_pretrained(where, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True, device_map="auto")
inputs = processor(text="what color <|image|>", images=Image.new("RGB", (50, 20), "red"))
print(model.generate(**inputs.to(model.device), max_new_tokens=5).tolist())
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    inputs = processor(text="what color <|image|>", images=Image.new("RGB", (50, 20), "red"))
    assert json.loads(run.stdout) == load(directory).generate(**inputs, max_new_tokens=5).tolist()
    warned = [word for word in ("newly", "UNEXPECTED", "MISSING", "Warning") if word in run.stderr]
    assert not warned, run.stderr


def test_the_configuration_tells_the_rows_of_an_image(directory, processor):
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    assert config.tokens_per_image == processor.tokens_per_image == ROWS
