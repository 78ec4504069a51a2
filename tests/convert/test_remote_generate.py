"""The exported model in transformers against ours: logits, and every way of generating."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exported import ATTENTIONS, answers, batch, export, grouped_model, load, offline
from id_tokenizer import IdTokenizer
from left_padding import left_padded
from transformers import DynamicCache

from megatron_owl2.convert.mapping import constants
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.model.owl2 import Owl2


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def ours() -> Owl2:
    return grouped_model()


@pytest.fixture(scope="module")
def grouped(ours, tmp_path_factory) -> Path:
    return export(ours, tmp_path_factory.mktemp("grouped") / "export")


def prompts_and_images() -> tuple[list[list[int]], list[list[torch.Tensor]]]:
    """Prompts of many lengths with no, one or two images."""
    generator = torch.Generator().manual_seed(3)
    prompts, images = [], []
    for i in range(9):
        words = torch.randint(3, 320, (2 + 7 * i % 11,), generator=generator).tolist()
        for at in (1, 0)[: i % 3]:
            words.insert(at * len(words) // 2, IMAGE_TOKEN_ID)
        prompts.append([1, *words])
        images.append(list(torch.randn(i % 3, 3, 28, 28, generator=generator)))
    return prompts, images


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_logits_of_our_model(ours, grouped, attention):
    prompts, images = prompts_and_images()
    inputs = batch(5, prompts, images)
    rows = left_padded(prompts, 5)
    with torch.no_grad():
        visual = ours.encode_images(inputs["pixel_values"])
        hidden_states = ours.hidden_states(
            ours.merge(rows.tokens, visual, rows.vision_token_index),
            rows.modality,
            rows.vision_token_index,
            rows.position_ids,
            attention_mask=rows.attention_mask,
        )
        wanted = ours.head(hidden_states).transpose(0, 1)
        model = load(grouped, attn_implementation=attention)
        logits = model(**inputs).logits
    assert model.model.layers[0].self_attn.k_proj.multiway[1].weight.shape == (16, 32)
    kept = rows.valid
    torch.testing.assert_close(logits[kept], wanted[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_padded_batch_answers_like_its_rows_and_like_our_generator(ours, grouped, attention):
    prompts, images = prompts_and_images()
    model = load(grouped, attn_implementation=attention)
    together = answers(model, batch(5, prompts, images), max_new_tokens=12, min_new_tokens=1)
    alone = [
        answers(model, batch(5, [p], [i]), max_new_tokens=12, min_new_tokens=1)[0]
        for p, i in zip(prompts, images, strict=True)
    ]
    assert together == alone
    assert len({len(row) for row in together}) > 2
    generator = Generator(LoadedModel(ours, ours.model, IdTokenizer(ours.model.decoder.vocab_size)))
    assert generator.generate_ids(prompts, images, 12) == together


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "use_cache": False},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
        {"repetition_penalty": 1.3},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "disable_compile": True},
    ],
)
def test_other_ways_of_generating_keep_every_row_with_its_images(grouped, options):
    prompts, images = prompts_and_images()
    model = load(grouped)
    per_row = options.get("num_return_sequences", 1)
    alone = [
        answer
        for p, i in zip(prompts, images, strict=True)
        for answer in answers(model, batch(5, [p], [i]), max_new_tokens=8, **options)
    ]
    assert len(alone) == per_row * len(prompts)
    greedy = answers(model, batch(5, prompts, images), max_new_tokens=8)
    if "prompt_lookup_num_tokens" not in options:  # which takes one row at a time
        assert answers(model, batch(5, prompts, images), max_new_tokens=8, **options) == alone
    same = bool({"top_k", "prompt_lookup_num_tokens", "cache_implementation"} & options.keys())
    assert (alone == [answer for answer in greedy for _ in range(per_row)]) == same


def test_samples_of_a_row_see_the_images_of_that_row(grouped):
    prompts, images = prompts_and_images()
    model = load(grouped)
    inputs = batch(5, prompts, images)
    ids, expanded = model._expand_inputs_for_generation(2, False, **inputs)
    with torch.no_grad():
        logits = model(input_ids=ids, **expanded).logits
        torch.testing.assert_close(logits, model(**inputs).logits.repeat_interleave(2, dim=0))


def test_a_conversation_goes_on_from_its_cache(grouped):
    prompts, images = prompts_and_images()
    model, cache = load(grouped), DynamicCache()
    first = batch(5, [prompts[1]], [images[1]])
    answer = answers(model, first, max_new_tokens=4, min_new_tokens=4, past_key_values=cache)[0]
    assert 0 < cache.get_seq_length() < first["input_ids"].shape[1] + 4
    longer = [*prompts[1], *answer, *prompts[2]]
    inputs = batch(5, [longer], [images[1] + images[2]])
    encoded = []
    model.model.vision_model.register_forward_hook(lambda *args: encoded.append(len(args[1][0])))
    continued = answers(model, inputs, max_new_tokens=6, past_key_values=cache)
    assert encoded == [2]  # not the three of the whole conversation
    assert continued == answers(model, inputs, max_new_tokens=6)


def test_embeddings_may_hold_the_visual_tokens_already(grouped):
    model = load(grouped)
    prompts, images = prompts_and_images()
    inputs = batch(5, prompts, images)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    where = inputs["modality"].bool()
    with torch.no_grad():
        embedded[where] = model.model.get_image_features(inputs["pixel_values"]).flatten(0, 1)
        wanted = model(**inputs).logits
        given = {k: inputs[k] for k in ("attention_mask", "modality")}
        torch.testing.assert_close(model(inputs_embeds=embedded, **given).logits, wanted)
    new = model.generate(inputs_embeds=embedded, **given, max_new_tokens=6)
    whole = model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(new, whole[:, inputs["input_ids"].shape[1] :])


def test_positions_start_at_the_first_token_and_are_exact(ours, grouped):
    """Also with bfloat16 weights, whose own numbers would be too coarse for them."""
    model = load(grouped, dtype=torch.bfloat16)
    seen = {}

    def keep(name):
        return lambda module, args: seen.update({name: args[2]})

    model.model.layers[0].register_forward_pre_hook(keep("rotary"))
    layers = model.model.visual_abstractor.encoder["layers"]
    layers[1].register_forward_pre_hook(keep("tables"))
    prompts, images = prompts_and_images()
    inputs = batch(5, [[1] + [9] * 59, *prompts], [[], *images])
    model(**inputs)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    angles = positions.unsqueeze(-1) * 5e3 ** (-torch.arange(0, 8, 2).double() / 8)
    angles = torch.cat([angles, angles], dim=-1)
    for table, function in zip(seen["rotary"], (torch.cos, torch.sin), strict=True):
        assert table.dtype == torch.bfloat16
        torch.testing.assert_close(table[:, 0].double(), function(angles), atol=2**-8, rtol=0)
    tables = torch.cat(list(constants(ours.model).values()))
    torch.testing.assert_close(seen["tables"], tables.bfloat16(), atol=2**-8, rtol=0)


def test_hidden_states_and_attentions(grouped):
    model = load(grouped, attn_implementation="eager")
    inputs = batch(5, *prompts_and_images())
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    b, s = inputs["input_ids"].shape
    assert [tuple(x.shape) for x in out.hidden_states] == [(b, s, 32)] * 4
    assert [tuple(x.shape) for x in out.attentions] == [(b, 4, s, s)] * 3


def test_images_and_their_rows_must_agree(grouped):
    model = load(grouped)
    inputs = batch(5, *prompts_and_images())
    images = inputs.pop("pixel_values")
    with pytest.raises(ValueError, match=r"45 image rows, but pixel_values hold 8 images.*40 rows"):
        model(**inputs, pixel_values=images[1:])
    for call in (model, lambda **given: model.generate(**given, max_new_tokens=2)):
        with pytest.raises(ValueError, match="45 image rows, but pixel_values hold 0 images"):
            call(**inputs)
        with pytest.raises(ValueError, match="0 image rows, but pixel_values hold 9 images"):
            call(input_ids=inputs["input_ids"], pixel_values=images)
    with pytest.raises(ValueError, match=r"\[9, 3, 14, 28\], but this model takes"):
        model(**inputs, pixel_values=images[:, :, :14])
    # A collator that appends completions to input_ids, or moves rows, may know no modality.
    longer = inputs | {"input_ids": F.pad(inputs["input_ids"], (0, 2), value=5)}
    del longer["attention_mask"]
    shapes = r"modality is \[9, 16\], the tokens are \[9, 18\]; what is added to input_ids needs"
    with pytest.raises(ValueError, match=shapes):
        model(**longer, pixel_values=images)


def test_sixteen_bits_answer_with_pixels_in_32(grouped):
    inputs = batch(5, *prompts_and_images())
    assert inputs["pixel_values"].dtype == torch.float32
    out = load(grouped, dtype=torch.bfloat16).generate(**inputs, max_new_tokens=2)
    assert out.shape == (9, inputs["input_ids"].shape[1] + 2)
