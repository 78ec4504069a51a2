"""Attention maps: causal probabilities, transformers' numbers, and the averages by modality."""

import json

import numpy as np
import pytest
import torch
from exported import batch, export, grouped_model, load, offline
from hf_dirs import small_tokenizer
from PIL import Image
from tiny_data import make_image

import megatron_owl2
from megatron_owl2.cli import visualize_attention
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.attention_maps import AttentionMaps, attention_maps, modality_shares
from megatron_owl2.model.kernels.local import Attention
from megatron_owl2.plotting.attention import Range, ranges

PROMPT, ANSWER = [1, 40, 41, IMAGE_TOKEN_ID, 50, IMAGE_TOKEN_ID, 60], [70, 71, 72]
SIZE = 1 + 2 + 5 + 1 + 5 + 1 + 3  # an image takes 5 positions
NAMES = ("text_on_vision", "text_on_text", "vision_on_vision", "vision_on_text")


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    make_image(0).save(folder / "0.png")
    return export(grouped_model(), folder / "hf", tokenizer=small_tokenizer(folder))


@pytest.fixture(scope="module")
def images():
    return list(torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3)))


@pytest.fixture(scope="module")
def found(directory, images) -> AttentionMaps:
    loaded = megatron_owl2.load(directory).generator.loaded
    found = attention_maps(loaded, PROMPT, images, ANSWER)
    assert all(type(layer.attention.core) is Attention for layer in loaded.model.decoder.layers)
    return found


def test_maps_are_causal_probabilities(found):
    assert found.maps.shape == (3, SIZE, SIZE)
    assert (found.maps >= 0).all() and not found.maps.triu(1).any()
    torch.testing.assert_close(found.maps.sum(-1), torch.ones(3, SIZE), rtol=0, atol=1e-6)
    assert found.vision.nonzero()[:, 0].tolist() == [*range(3, 8), *range(9, 14)]
    assert found.prompt_positions == SIZE - len(ANSWER)


def test_maps_are_those_of_the_exported_model(directory, found, images):
    """Eager attention of transformers, which returns its probabilities."""
    model = load(directory, attn_implementation="eager")
    inputs = batch(5, [[*PROMPT, *ANSWER]], [images])
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    expected = torch.stack([layer[0].mean(0) for layer in attentions])
    assert expected.shape == found.maps.shape and len({float(m[-1, 0]) for m in expected}) == 3
    torch.testing.assert_close(found.maps, expected, rtol=0, atol=1e-5)


def test_shares_by_hand():
    """Positions: text, vision, vision, text, text; the first text cannot see vision."""
    one = torch.tensor(
        [
            [1.0, 0, 0, 0, 0],
            [0.5, 0.5, 0, 0, 0],
            [0.2, 0.4, 0.4, 0, 0],
            [0.1, 0.2, 0.3, 0.4, 0],
            [0.3, 0.1, 0.1, 0.2, 0.3],
        ]
    )
    vision = torch.tensor([False, True, True, False, False])
    shares = modality_shares(AttentionMaps(one[None], vision, 4))
    values = [float(getattr(shares, name)) for name in NAMES]
    assert values == pytest.approx([0.35, 0.65, 0.65, 0.35])
    with pytest.raises(InferenceError, match="without an image nothing attends to vision"):
        modality_shares(AttentionMaps(one[None], torch.zeros(5, dtype=torch.bool), 4))


def test_ranges_of_the_positions(found):
    assert ranges(found) == [
        Range("text", 0, 3),
        Range("image", 3, 8),
        Range("text", 8, 9),
        Range("image", 9, 14),
        Range("text", 14, 15),
        Range("answer", 15, 18),
    ]


def command(directory, output, *more):
    image = directory.parent / "0.png"
    options = ["--checkpoint", directory, "--image", image, "--output", output, *more]
    return visualize_attention.main([*map(str, options)], "owl2 visualize-attention")


def test_the_command_draws_two_models(directory, tmp_path, capsys):
    prompt = ["--prompt", "badal $x$ <|image|> kunat", "--max-new-tokens", "6"]
    assert command(directory, tmp_path / "new", *prompt, "--compare", directory) == 0
    with Image.open(tmp_path / "new" / "attention.png") as page:
        pixels = np.asarray(page.convert("RGB"))
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "new" / name) for name in ("attention.png", "attention.json")
    ]
    height, width, _ = pixels.shape
    assert width > 1.2 * height
    first, second = (pixels[:, side : side + width // 2] for side in (0, width // 2))
    for color in ("#2b6cb0", "#ed8936", "#0f7b3e"):  # text, image, answer
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        counts = [int((half == rgb).all(-1).sum()) for half in (first, second)]
        assert min(counts) > 500
    one, other = json.loads((tmp_path / "new" / "attention.json").read_text())
    assert one == other and len(one["layers"]) == 3
    for row in one["layers"]:
        assert row["text_on_vision"] + row["text_on_text"] == pytest.approx(1, abs=1e-6)
        assert row["vision_on_vision"] + row["vision_on_text"] == pytest.approx(1, abs=1e-6)


def test_a_given_answer_and_layers(directory, tmp_path, capsys):
    given = ["--prompt", "badal", "--answer", "kunat dinap"]
    assert command(directory, tmp_path, *given, "--layers", "2,0") == 0
    (told,) = json.loads((tmp_path / "attention.json").read_text())
    model = megatron_owl2.load(directory)
    longer = len(model.tokenizer.encode("kunat dinap"))
    assert told["answer"] == "kunat dinap"
    assert command(directory, tmp_path, "--prompt", "badal", "--answer", "") == 0
    (shorter,) = json.loads((tmp_path / "attention.json").read_text())
    assert told["positions"] - shorter["positions"] == longer
    assert command(directory, tmp_path, *given, "--layers", "3") == 2
    assert "there is no layer 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(directory, tmp_path, *given, "--layers", "0,x")
    assert "'0,x' is not as 0,15,31" in capsys.readouterr().err
