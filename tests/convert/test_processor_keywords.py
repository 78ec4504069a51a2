"""Keywords of tokenizers in calls of the exported processor and of its tokenizer."""

import itertools

import numpy as np
import pytest
import torch
from exported import offline
from hf_dirs import small_tokenizer
from PIL import Image
from transformers import AutoProcessor

from megatron_owl2.config.schema import AbstractorConfig, DecoderConfig, ModelConfig, VisionConfig
from megatron_owl2.convert import hf_config
from megatron_owl2.convert.remote_files import write_remote_code

ROWS = 5  # of an image
PROMPT = "USER: <|image|>What is this? ASSISTANT:"
COLUMNS = ("input_ids", "attention_mask", "modality")


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def processor(tmp_path_factory, no_network):
    """The processor of an export, whose weights it does not need."""
    model = ModelConfig(
        vision=VisionConfig(image_size=28),
        abstractor=AbstractorConfig(num_queries=ROWS - 1),
        decoder=DecoderConfig(vocab_size=320, max_positions=48),
    )
    directory = tmp_path_factory.mktemp("export")
    small_tokenizer(directory).rename(directory / "tokenizer.model")
    hf_config.write(directory, "owl2", model, torch.float32)
    hf_config.write_tokenizer(directory, model)
    write_remote_code(directory, "owl2")
    return AutoProcessor.from_pretrained(directory, trust_remote_code=True)


@pytest.fixture(scope="module")
def image():
    return Image.new("RGB", (60, 40), (200, 20, 20))


def lists(inputs) -> dict:
    return {name: np.asarray(inputs[name]).tolist() for name in COLUMNS if name in inputs}


GRID = [
    {"padding": padding, "truncation": truncation, "max_length": length, **more}
    for padding, truncation, length in (
        (True, None, None),
        ("longest", False, None),
        ("max_length", False, 30),
        ("max_length", True, 9),
        ("max_length", True, None),
        (True, "longest_first", 9),
        (True, "only_first", 2),
        (False, True, 1),
        ("do_not_pad", "do_not_truncate", None),
    )
    for more in ({}, {"add_special_tokens": False}, {"padding_side": "right"})
] + [
    {"padding": True, "pad_to_multiple_of": 8},
    {"padding": "max_length", "max_length": 29, "pad_to_multiple_of": 8},
    {"padding": True, "return_attention_mask": False},
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keywords", GRID, ids=str)
def test_texts_alone_are_what_the_tokenizer_makes_of_them(processor, monkeypatch, keywords, side):
    texts = ["what is bal dem", "bal", "USER: dim the bol? no and once more"]
    monkeypatch.setattr(processor.tokenizer, "truncation_side", side)
    wanted = processor.tokenizer(texts, **keywords)
    found = processor(text=texts, return_tensors=None, **keywords)
    assert found["input_ids"] == wanted["input_ids"]
    assert found.get("attention_mask") == wanted.get("attention_mask")
    assert [len(row) for row in found["modality"]] == [len(row) for row in found["input_ids"]]


def test_a_vision_collator_gets_its_batch(processor, image):
    """The calls of trl's collators and of other scripts for fine-tuning."""
    texts = [PROMPT, "USER: and <|image|>or <|image|>? ASSISTANT:"]
    images = [[image], [image, image]]
    batch = processor(
        images=images,
        text=texts,
        padding=True,
        padding_side="right",
        pad_to_multiple_of=16,
        truncation=True,
        max_length=64,
        add_special_tokens=False,
        return_tensors="pt",
    )
    plain = processor(text=texts, images=images, padding_side="right")
    assert batch["input_ids"].shape == (2, 48) and len(batch["pixel_values"]) == 3
    assert (batch["modality"] == 1).sum(1).tolist() == [ROWS, 2 * ROWS]
    for i in range(2):  # BOS alone is missing
        whole = plain["input_ids"][i][plain["attention_mask"][i] == 1]
        assert batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist() == whole[1:].tolist()
    untouched = processor(
        images=images,
        text=texts,
        padding=True,
        padding_side="left",
        pad_to_multiple_of=None,
        truncation=False,
        max_length=None,
        return_tensors="pt",
    )
    assert lists(untouched) == lists(processor(text=texts, images=images))


def test_a_chat_template_passes_them_on(processor, image):
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    chats = [[{"role": "user", "content": asked}], [{"role": "user", "content": "Hi?"}]]
    keywords = {"padding": "max_length", "max_length": 40, "truncation": True}
    given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    batch = processor.apply_chat_template(
        chats, return_tensors="np", processor_kwargs=keywords, **given
    )
    wanted = processor(text=[PROMPT, "USER: Hi? ASSISTANT:"], images=[image], **keywords)
    assert isinstance(batch["input_ids"], np.ndarray) and batch["input_ids"].shape == (2, 40)
    assert lists(batch) == lists(wanted)
    ids = processor.apply_chat_template(chats[1], tokenize=True, return_tensors=None)
    assert ids == processor(text="USER: Hi? ", return_tensors=None)["input_ids"]


def test_images_stay_whole_when_texts_are_cut(processor, image):
    inputs = processor(text=PROMPT, images=image)
    length, places = inputs["input_ids"].shape[1], inputs["modality"][0].nonzero().flatten()
    first, last = places[0].item(), places[-1].item()
    for limit in range(1, length + 1):
        for side, fits in (("right", limit > last), ("left", limit > length - first)):
            keywords = {"truncation": True, "max_length": limit, "truncation_side": side}
            if not fits:
                least = last + 1 if side == "right" else length - first + 1
                with pytest.raises(ValueError, match=f"cuts an image .* at least {least} or short"):
                    processor(text=PROMPT, images=image, **keywords)
                continue
            cut = processor(text=PROMPT, images=image, **keywords)
            assert cut["input_ids"].shape[1] == limit and cut["modality"].sum() == ROWS
            assert cut["input_ids"][0, 0] == 1  # BOS stays, as in the tokenizer
            ids = inputs["input_ids"][0].tolist()
            kept = ids[:limit] if side == "right" else ids[:1] + ids[len(ids) - limit + 1 :]
            assert cut["input_ids"][0].tolist() == kept
    with pytest.raises(ValueError, match="cuts an image of text 2, which has 10 ids, 10 of them"):
        texts = ["bal", "<|image|><|image|>"]
        processor(text=texts, images=[image] * 2, truncation=True, max_length=8)


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_tensors_are_of_the_kind_asked_for(processor, image, kind):
    inputs = processor(text=PROMPT, images=image, return_tensors=kind)
    wanted = {"pt": torch.Tensor, "np": np.ndarray, None: list}[kind]
    assert all(isinstance(inputs[name], wanted) for name in (*COLUMNS, "pixel_values"))
    assert np.asarray(inputs["pixel_values"]).shape == (1, 3, 28, 28)
    if kind is not None:
        assert str(inputs["input_ids"].dtype).endswith("int64")
        with pytest.raises(ValueError, match="rows of .* ids make no tensor; set padding=True"):
            processor(text=["bal", "bal dem"], padding=False, return_tensors=kind)
    ragged = processor(text=["bal", "bal dem"], padding=False, return_tensors=None)
    assert len({len(row) for row in ragged["input_ids"]}) == 2


def test_dicts_of_keywords_are_as_good(processor, image):
    flat = processor(text=PROMPT, images=image, padding="max_length", max_length=40)
    groups = {
        "text_kwargs": {"padding": "max_length", "max_length": 40},
        "images_kwargs": {},
        "common_kwargs": {"return_tensors": "np"},
    }
    grouped = processor(text=PROMPT, images=image, return_tensors="pt", **groups)
    assert lists(grouped) == lists(flat) and isinstance(grouped["input_ids"], torch.Tensor)
    with_types = processor(text=PROMPT, images=image, return_mm_token_type_ids=True)
    assert torch.equal(with_types["mm_token_type_ids"], with_types["modality"])


def test_the_sides_are_those_of_the_tokenizer(processor, monkeypatch):
    texts = ["bal", "bal dem and more"]
    left, right = (processor(text=texts, padding_side=side) for side in ("left", "right"))
    assert lists(processor(text=texts)) == lists(left) != lists(right)
    monkeypatch.setattr(processor.tokenizer, "padding_side", "right")
    assert lists(processor(text=texts)) == lists(right)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"padding": "shortest"}, "padding is 'shortest'; it must be one of True, 'longest'"),
        ({"padding_side": "top"}, "padding_side is 'top'; it must be one of 'left', 'right'"),
        ({"truncation": "only_second", "max_length": 9}, "truncation is 'only_second'; it must"),
        ({"max_length": 9}, "max_length=9 has no effect without truncation=True"),
        ({"max_length": 0, "truncation": True}, "max_length is 0; it must be a whole number above"),
        ({"max_length": 9.5, "truncation": True}, "max_length is 9.5; it must be a whole number"),
        ({"pad_to_multiple_of": -8}, "pad_to_multiple_of is -8; it must be a whole number above"),
        ({"pad_to_multiple_of": 8, "padding": False}, "pad_to_multiple_of needs padding=True"),
        ({"add_special_tokens": "no"}, "add_special_tokens is 'no'; it must be True or False"),
        ({"return_tensors": "tf"}, "return_tensors is 'tf'; it must be one of 'pt', 'np', None"),
        ({"return_offsets_mapping": True}, "return_offsets_mapping=True is nothing that"),
        ({"text_kwargs": {"stride": 4}}, "stride=4 is nothing that this tokenizer can do"),
        ({"do_resize": False}, "do_resize=False cannot be chosen: images always get the model's"),
        ({"images_kwargs": {"size": 99}}, "size=99 cannot be chosen"),
    ],
)
def test_what_it_cannot_follow_is_refused(processor, image, keywords, message):
    with pytest.raises(ValueError, match=message):
        processor(text=PROMPT, images=image, **keywords)


def test_an_unknown_keyword_is_refused_and_one_switched_off_is_not(processor):
    with pytest.raises(TypeError, match="max_len is no keyword of this processor; it takes add_"):
        processor(text="bal", max_len=9)
    with pytest.raises(TypeError, match="video_kwargs is no keyword"):
        processor(text="bal", video_kwargs=None)
    off = {"return_offsets_mapping": False, "stride": None, "do_rescale": None}
    assert lists(processor(text="bal", **off)) == lists(processor(text="bal"))


def test_the_wrong_order_is_named(processor, image):
    order = r"images come first and text second; name them: processor\(images=..., text=...\)"
    for texts, images in itertools.product((PROMPT, [PROMPT]), (image, [image], [[image]])):
        with pytest.raises(ValueError, match=f"text holds (Image|list), not a string; {order}"):
            processor(texts, images)
    with pytest.raises(ValueError, match=rf"images hold a text with <\|image\|>; {order}"):
        processor([PROMPT], ["owl.jpg"])
    with pytest.raises(ValueError, match=f"give text: one string or several; {order}"):
        processor(PROMPT)  # as a tokenizer takes it
    for wrong in (3, b"USER:", [["USER:"]], torch.zeros(2)):
        with pytest.raises(ValueError, match="text holds .*, not a string"):
            processor(text=wrong)
    assert lists(processor([image], [PROMPT])) == lists(processor(text=[PROMPT], images=[image]))


def test_texts_and_images_that_are_nothing_are_refused(processor, image):
    with pytest.raises(ValueError, match="text 2 of 3 is empty"):
        processor(text=["bal", "", "dem"])
    empty = processor(text=["bal", ""], add_special_tokens=False)  # a completion may be empty
    assert empty["attention_mask"][1].sum() == 0 and empty["input_ids"].dtype == torch.int64
    assert processor(text="", add_special_tokens=False)["input_ids"].shape == (1, 0)
    for nothing in ([[]], [None]):
        with pytest.raises(ValueError, match="0 images|an empty list or None"):
            processor(text=PROMPT, images=nothing)
    mixed = processor(text=[PROMPT, "bal"], images=[[image], None])
    assert len(mixed["pixel_values"]) == 1


def test_answers_are_decoded_and_names_are_told(processor):
    rows = processor(text=["bal dem", "and no"], add_special_tokens=False)["input_ids"]
    whole = [[1, *row, 2] for row in rows.tolist()]
    assert processor.batch_decode(whole, skip_special_tokens=True) == ["bal dem", "and no"]
    assert processor.decode(whole[0], skip_special_tokens=True) == "bal dem"
    assert processor.post_process_image_text_to_text(whole) == ["bal dem", "and no"]
    assert set(processor.model_input_names) == {*COLUMNS, "pixel_values"}


def test_arrays_are_images_in_every_container(processor, image):
    array = np.array(image)
    wanted = processor(text="<|image|>x", images=image)
    for images in (array, [array], [[array]]):
        found = processor(text="<|image|>x", images=images)
        assert torch.equal(found["pixel_values"], wanted["pixel_values"])
    assert len(processor(text="<|image|>a<|image|>", images=[array, array])["pixel_values"]) == 2
    with pytest.raises(ValueError, match="an empty list or None"):
        processor(text="<|image|>a<|image|>", images=[array, None])
    with pytest.raises(TypeError, match="do_resize: leave it out; images always get the model's"):
        processor.image_processor(image, do_resize=False)


def test_ids_without_a_piece_have_no_text(processor):
    """A model may embed more rows than the tokenizer has pieces."""
    ids = processor.tokenizer("red")["input_ids"]
    assert processor.batch_decode([[*ids, 350, 5000]], skip_special_tokens=True) == ["red"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "human", "content": "hi"}, "must be system, user or assistant; found human"),
        ({"from": "human", "value": "hi"}, "must be system, user or assistant"),
        ({"role": "user", "content": None}, "must have a 'content'"),
        ({"role": "user"}, "must have a 'content'"),
        ({"role": "user", "content": [{"type": "text", "content": "hi"}]}, "'text' with a 'text'"),
        ({"role": "user", "content": [{"type": "video"}]}, "a part of a content must be"),
        ({"role": "user", "content": ["hi"]}, "a part of a content must be"),
    ],
)
def test_a_chat_loses_nothing_without_a_word(processor, message, reason):
    with pytest.raises(Exception, match=reason):
        processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
