"""Processor and chat template of version 1's exports: the ids of the official code for each choice
of tokenisation, images and videos in their places, and texts that stay texts."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from exported import load, offline
from owl1_dirs import OFFICIAL, ROWS, with_code
from PIL import Image
from sentencepiece import SentencePieceProcessor
from transformers import AutoProcessor, AutoTokenizer, pipeline

from megatron_owl2.data.images import decode, resize_square

KINDS = ("turns", "official_train", "official_inference")
PROMPTS = json.loads((OFFICIAL / "prompts.json").read_text())["rows"]
CONVERSATIONS = json.loads((OFFICIAL / "conversations.json").read_text())["rows"]
SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
IMAGE = Image.new("RGB", (9, 6), "red")
SHOWN = {"type": "image", "image": IMAGE}
QUIRKS = {  # of official training, which are not imitated, and texts that it cuts
    "text_starts_with_placeholder",
    "answer_cut",
    "answer_cut_image",
    "cut_before_answer",
    "second_image_does_not_fit",
    "first_piece_too_long",
}


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owl1")
    found = {kind: with_code(folder / kind, tokenization=kind) for kind in KINDS[:2]}
    found["official_inference"] = with_code(folder / "released")
    found["video"] = with_code(folder / "video", video=True)
    return found


@pytest.fixture(scope="module")
def processors(directories):
    load_processor = AutoProcessor.from_pretrained
    return {k: load_processor(d, trust_remote_code=True) for k, d in directories.items()}


@pytest.fixture(scope="module")
def pieces():
    """The ids of texts that are tokenised alone, one after the other; numbers are ids."""
    model = SentencePieceProcessor(model_file=str(OFFICIAL / "hf_ckpt" / "tokenizer.model"))
    return lambda *texts: sum([[t] if isinstance(t, int) else model.encode(t) for t in texts], [])


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def ask(*content, system: str = "") -> list[dict]:
    question = content[0] if isinstance(content[0], str) else list(content)
    given = [{"role": "system", "content": system}] if system else []
    return [*given, {"role": "user", "content": question}]


def answer(value: str) -> dict:
    return {"role": "assistant", "content": value}


def ids_of(processor, messages, generate: bool = True) -> list[int]:
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=generate, return_dict=True
    )
    assert (inputs["input_ids"] == -1).sum() == ROWS * len(inputs.get("pixel_values", []))
    return inputs["input_ids"][0].tolist()


def test_prompts_have_the_ids_of_the_official_processor(processors):
    processor = processors["official_inference"]
    for row in PROMPTS:
        images = [IMAGE] * row["text"].count("<image>") or None
        inputs = processor(text=row["text"], images=images)
        assert inputs["input_ids"].tolist() == [row["input_ids"]], row["name"]
        assert inputs.keys() == {"input_ids", "attention_mask"} | ({"pixel_values"} & inputs.keys())
        assert len(inputs.get("pixel_values", [])) == len(images or [])


def test_messages_have_the_ids_of_the_official_prompts(processors):
    processor = processors["official_inference"]
    wanted = {row["name"]: row["input_ids"] for row in PROMPTS}
    one = ask(SHOWN, text("What is in the picture?"))
    assert ids_of(processor, ask("Name a colour of the sky.")) == wanted["g_text"]
    assert ids_of(processor, one) == wanted["g_one_image"]
    two = ask(SHOWN, SHOWN, text("Which shirt is darker?"))
    assert ids_of(processor, two) == wanted["g_two_images"]
    said = answer("A red bus stands in front of the old station.")
    more = [*one, said, *ask("How many people are there?")]
    assert ids_of(processor, more) == wanted["g_multi_turn"]


def test_conversations_have_the_ids_of_official_training(processors):
    processor, compared = processors["official_train"], 0
    for row in CONVERSATIONS:
        if row["name"] in QUIRKS:
            continue
        images = [IMAGE] * row["text"].count("<image>") or None
        found = processor(text=row["text"], images=images)["input_ids"][0].tolist()
        wanted = row["input_ids"][: row["seq_length"]]
        if wanted and wanted[-1] == 2:  # a string is a prompt, whose answer may go on
            wanted = wanted[:-1]
        assert found == wanted, row["name"]
        compared += 1
    assert compared == len(CONVERSATIONS) - len(QUIRKS) == 14


def test_messages_have_the_ids_of_official_training_up_to_the_answer(processors):
    processor = processors["official_train"]
    wanted = {row["name"]: row["input_ids"][: row["seq_length"]] for row in CONVERSATIONS[:7]}
    said = answer("A red bus stands in front of the old station.")
    blue = [*ask("Name a colour of the sky."), answer("The sky is blue.")]
    pictured = ask(SHOWN, text("What is in the picture?"))
    inside = ask(text("See "), SHOWN, text(" and say: What is in the picture?"))
    many = [*ask("How many people are there?"), answer("There are three people and one dog.")]
    for name, messages in (
        ("text_single", blue),
        ("one_image", [*pictured, said]),
        ("multi_turn", [*pictured, said, *many]),
        ("image_in_last_turn", [*blue, *pictured, said]),
        ("image_inside_the_question", [*inside, said]),
    ):
        whole = ids_of(processor, messages, generate=False)
        assert whole == wanted[name], name
        asked = ids_of(processor, messages[:-1])
        assert asked == whole[: len(asked)] and len(asked) < len(whole)


def test_turns_have_one_rule_for_training_and_for_asking(processors, pieces):
    processor, run = processors["turns"], [-1] * ROWS
    messages = [
        *ask(SHOWN, SHOWN, text("\n Which <image> is\nHuman: darker? ")),
        answer(" The first AI: one."),
        *ask(text("And "), SHOWN, text(" ?")),
        answer("No."),
    ]
    given = [1, *pieces(f"{SYSTEM}\nHuman: "), *run, *pieces("\nHuman: "), *run]
    given += pieces("\nHuman: Which <image> is\nHuman: darker?\nAI:")
    assert ids_of(processor, messages[:1]) == given
    given += pieces(" The first AI: one.", 2, "\nHuman: And ") + run + pieces(" ?\nAI:")
    assert ids_of(processor, messages[:3]) == given
    assert ids_of(processor, messages, generate=False) == given + pieces("No.", 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_the_template(processors, kind):
    processor = processors[kind]
    end = "AI:" if kind == "turns" else "AI: "
    stop = "" if kind == "official_inference" else "</s>"
    for content, line in (
        (["What?"], "Human: What?"),
        ([" What?\n "], "Human:  What?\n "),  # as it is, without images
        ([text(" a"), text("b ")], "Human:  ab "),
        ([SHOWN, text("What?")], "Human: <image>\nHuman: What?"),
        (
            [SHOWN, text(" "), SHOWN, text("\n"), text(" What? ")],
            2 * "Human: <image>\n" + "Human: What?",
        ),
        ([text(" See "), SHOWN, text(" and "), SHOWN, text(" ")], "Human: See <image> and <image>"),
        ([SHOWN, text("a "), SHOWN], "Human: <image>\nHuman: a <image>"),
        ([SHOWN], "Human: <image>\nHuman: "),
    ):
        messages = ask(*content)
        asked = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert asked == f"{SYSTEM}\n{line}\n{end}"
        whole = [*messages, answer("Yes."), *ask("Why?")]
        asked = processor.apply_chat_template(whole, add_generation_prompt=True)
        assert asked == f"{SYSTEM}\n{line}\nAI: Yes.{stop}\nHuman: Why?\n{end}"
    asked = processor.apply_chat_template(
        ask("Why?", system="Be brief."), add_generation_prompt=True
    )
    assert asked == f"Be brief.\nHuman: Why?\n{end}"
    asked = processor.apply_chat_template(ask("Why?", system=" "), add_generation_prompt=True)
    assert asked == f"{SYSTEM}\nHuman: Why?\n{end}"


@pytest.mark.parametrize("kind", KINDS)
def test_rendered_prompts_and_parts_are_the_same_as_ids(processors, kind):
    processor = processors[kind]
    messages = [*ask(SHOWN, text("a </s> <image> b")), answer("</s>c"), *ask("AI: \nHuman: d")]
    whole = ids_of(processor, messages)
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    again = processor(text=rendered, images=IMAGE)["input_ids"][0].tolist()
    assert again == whole
    # Answers end in EOS, also behind an `AI: ` that the rules of official training find anywhere.
    ends = {"turns": 1, "official_train": 2, "official_inference": 0}
    assert whole.count(2) == ends[kind] and whole.count(1) == 1


def test_only_parts_and_placeholders_of_plain_strings_are_media(processors, pieces):
    spelled = "<image> <|video|> </s>"
    for processor in processors.values():
        ids = ids_of(processor, ask(spelled))
        assert min(ids) > 0 and ids.count(2) == 0
    inputs = processors["turns"](text="<|video|> a", images=None)
    assert inputs["input_ids"].tolist() == [[1, *pieces("<|video|> a")]]
    inputs = processors["turns"](text="<image>a", images=IMAGE)
    assert inputs["input_ids"].tolist() == [[1, *[-1] * ROWS, *pieces("a")]]
    frames = processors["turns"](text="a <image> b", images=[[IMAGE, IMAGE, IMAGE]])
    assert (frames["input_ids"] == -1).sum() == 3 * ROWS and len(frames["pixel_values"]) == 3


def test_a_batch_is_padded_on_the_left_and_keeps_its_images(processors):
    processor = processors["turns"]
    shades = [Image.new("RGB", (5, 5), (shade, 0, 0)) for shade in (10, 90, 250)]
    texts = ["hello", "a <image> b <image>", "<image>"]
    inputs = processor(text=texts, images=[[], shades[:2], shades[2:]])
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    for row, entry in enumerate(texts):
        alone = processor(text=entry, images=[IMAGE] * entry.count("<image>") or None)
        ids = alone["input_ids"][0]
        assert torch.equal(inputs["input_ids"][row, -len(ids) :], ids)
        assert not inputs["input_ids"][row, : -len(ids)].any()
        assert inputs["attention_mask"][row].sum() == len(ids)
    assert inputs["pixel_values"][:, 0].mean((1, 2)).argsort().tolist() == [0, 1, 2]
    lists = processor(text=texts, images=shades, return_tensors=None, padding=False)
    assert [min(ids) for ids in lists["input_ids"]][1:] == [-1, -1]
    cut = processor(text="a <image> b c d", images=IMAGE, truncation=True, max_length=ROWS + 4)
    assert cut["input_ids"].shape[1] == ROWS + 4
    with pytest.raises(ValueError, match="cuts an image of text 1"):
        processor(text="a <image> b", images=IMAGE, truncation=True, max_length=ROWS)


def test_pixels_are_those_of_training(processors, tmp_path):
    processor, path = processors["turns"], tmp_path / "image.png"
    rng = np.random.default_rng(5)
    Image.fromarray(rng.integers(0, 256, (40, 31, 3), dtype=np.uint8)).save(path)
    settings = processor.image_processor
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (settings.image_mean, settings.image_std))
    wanted = (resize_square(decode(path.read_bytes()), 56).float() / 255 - mean) / std
    found = processor(text="<image>", images=str(path))["pixel_values"]
    torch.testing.assert_close(found[0], wanted, atol=1e-6, rtol=0)


def frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(count)]


def reds(processor, pixels: torch.Tensor) -> list[int]:
    """The red of every frame of a video [3, T, H, W]."""
    settings = processor.image_processor
    red = pixels[0].mean((1, 2)) * settings.image_std[0] + settings.image_mean[0]
    return (red * 255).round().int().tolist()


def test_videos_have_rows_of_their_own_and_the_official_frames(processors):
    processor = processors["video"]
    inputs = processor(
        text="a <|video|> b <image> c <|video|>", images=IMAGE, videos=[frames(4), frames(9)]
    )
    ids = inputs["input_ids"][0].tolist()
    assert [ids.count(-2), ids.count(-1)] == [2 * ROWS, ROWS] and ids.index(-2) < ids.index(-1)
    assert inputs["video_pixel_values"].shape == (2, 3, 4, 56, 56)
    shown = [reds(processor, clip) for clip in inputs["video_pixel_values"]]
    assert shown == [[0, 1, 2, 3], [1, 3, 5, 7]]
    for count, wanted in ((100, [12, 37, 62, 86]), (2, [0, 0, 0, 1]), (1, [0, 0, 0, 0])):
        array = np.stack([np.asarray(frame) for frame in frames(count)])
        for video in (frames(count), array):
            clip = processor(text="<|video|>", videos=video)["video_pixel_values"][0]
            assert reds(processor, clip) == wanted
    nested = processor(text=["hi", "<|video|>"], videos=[None, [frames(4)]])
    assert (nested["input_ids"] == -2).sum(1).tolist() == [0, ROWS]
    shown = {"type": "video", "video": frames(4)}
    inputs = processor.apply_chat_template(
        ask(shown, text("What happens here?")),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
    )
    line = "\nHuman: <|video|>\nHuman: What happens here?\nAI: "
    wanted = processor(text=SYSTEM + line, videos=[frames(4)])
    assert torch.equal(inputs["input_ids"], wanted["input_ids"])
    assert torch.equal(inputs["video_pixel_values"], wanted["video_pixel_values"])


def test_mistakes_are_named(processors, directories, tmp_path):
    processor, of_videos = processors["turns"], processors["video"]
    for call, words in (
        (lambda: processor(text="<image> <image>", images=IMAGE), "2 placeholders <image>, but 1"),
        (lambda: processor(text="a", images=[IMAGE] * 2), "0 placeholders <image>, but 2 images"),
        (lambda: processor(text="a", videos=[frames(4)]), "reads no videos; give their frames"),
        (lambda: processor(text="a", audio=[0.0]), "reads no audio"),
        (lambda: processor("<image>", IMAGE), "images come first and text second"),
        (lambda: processor(text=["a", ""]), "text 2 of 2 is empty"),
        (lambda: processor(text="a", max_length=3), "has no effect without truncation=True"),
        (lambda: of_videos(text="<|video|>"), "1 placeholders <|video|>, but 0 videos"),
        (lambda: of_videos(text="a", videos=[frames(2)] * 2), "0 placeholders <|video|>, but 2"),
        (lambda: of_videos(text="<|video|>", videos="a.mp4"), "of type str; give a list of its fr"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    with pytest.raises(TypeError, match="shape is no keyword of this processor"):
        processor(text="a", shape=3)
    for messages, words in (
        (ask({"type": "video", "video": frames(4)}), "of type 'image', or of type 'text'"),
        ([*ask("a"), {"role": "system", "content": "b"}], "role system must be the first"),
        ([{"role": "tool", "content": "b"}], "must be system, user or assistant; found tool"),
        ([{"role": "user", "content": []}], "must have a 'content'"),
    ):
        with pytest.raises(Exception, match=words):
            processor.apply_chat_template(messages)
    wrong = with_code(tmp_path / "wrong", tokenization="words")
    with pytest.raises(ValueError, match="tokenization is 'words'; it must be one of turns, offi"):
        AutoProcessor.from_pretrained(wrong, trust_remote_code=True)


def test_a_saved_processor_is_the_same(processors, tmp_path):
    for name, processor in processors.items():
        processor.save_pretrained(tmp_path / name)
        again = AutoProcessor.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert again.chat_template == processor.chat_template
        settings = ("tokens_per_image", "system", "tokenization", "frames_per_video")
        assert [getattr(again, s) for s in settings] == [getattr(processor, s) for s in settings]
        messages = [*ask(SHOWN, text("AI: a")), answer("b"), *ask("c")]
        assert ids_of(again, messages) == ids_of(processor, messages)


def test_rows_of_images_have_no_text(directories):
    tokenizer = AutoTokenizer.from_pretrained(directories["turns"], trust_remote_code=True)
    ids = tokenizer("The sky is blue.")["input_ids"]
    for media in ([-1] * ROWS, [-2] * ROWS):
        found = tokenizer.decode([*media, *ids, 2], skip_special_tokens=True)
        assert found.strip() == "The sky is blue."


def test_a_pipeline_answers_like_generate(processors, directories):
    processor, model = processors["turns"], load(directories["turns"])
    messages = ask(SHOWN, text("What is in the picture?"))
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    options = {"max_new_tokens": 8, "do_sample": False}
    out = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    wanted = processor.batch_decode(out, skip_special_tokens=True)[0]
    answering = pipeline("image-text-to-text", model=model, processor=processor)
    said = answering(text=messages, generate_kwargs=options, return_full_text=False)
    assert said[0]["generated_text"].strip() == wanted.strip()


@pytest.mark.slow
def test_nothing_but_transformers_is_needed(directories, tmp_path):
    """In a process that has neither this project nor torchvision and einops."""
    code = f"""
import sys
for name in ("megatron_owl2", "megatron", "torchvision", "einops"):
    sys.modules[name] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
where = {str(directories["video"])!r}
processor = AutoProcessor.from_pretrained(where, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(where, trust_remote_code=True)
image = Image.new("RGB", (50, 20), "red")
inputs = processor(text="what <image> and <|video|>", images=image, videos=[[image] * 4])
print(model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist())
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    ids = json.loads(run.stdout)[0]
    assert ids.count(0) >= 2 * ROWS and len(ids) > 2 * ROWS + 5
    warned = [word for word in ("newly", "UNEXPECTED", "MISSING", "Warning") if word in run.stderr]
    assert not warned, run.stderr
