"""Parity of version 1 with the official code's recorded outputs, in every parallel configuration;
the video variant's in the engine."""

import official_parity
import owl1_parity as parity
import pytest
import torch
from id_tokenizer import IdTokenizer
from owl1_parity import META, OFFICIAL, collapsed
from safetensors.torch import load_file

from megatron_owl2.convert.sources import from_released
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.mcore import setup

pytestmark = pytest.mark.distributed

VIDEO = load_file(OFFICIAL / "reference_video.safetensors")
NEW = len(META["video"]["generate_video"]["new_ids"])


@pytest.fixture(scope="module")
def deviations(tmp_path_factory):
    return parity.run(tmp_path_factory.mktemp("owl1"))


@pytest.mark.parametrize("name", parity.PARALLELISMS)
def test_outputs_gradients_training_and_answers_are_the_official_ones(deviations, name):
    assert not official_parity.beyond(deviations[name], parity.BOUNDS)


@pytest.fixture(scope="module")
def video_model():
    source = from_released(OFFICIAL / "hf_ckpt_video")
    loaded = LoadedModel(source.build().eval(), source.config.model, IdTokenizer(512))
    yield loaded
    setup.shutdown()


def frames():
    """[videos * frames, 3, H, W], a video's frames being neighbours."""
    return VIDEO["video/video_pixel_values"].transpose(1, 2).flatten(0, 1)


def test_the_video_variant_sees_what_the_official_one_saw(video_model):
    model = video_model.model
    with torch.no_grad():
        features = model.vision_model(frames(), 4).transpose(0, 1)
        video = model.encode_images(frames(), 4)
        image = model.encode_images(VIDEO["image/pixel_values"])
    for found, name in (
        (features, "video/vit_features"),
        (video, "video/visual_tokens"),
        (image, "image/visual_tokens"),
    ):
        wanted = VIDEO[name].view_as(found)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "media", "shown"),
    [("video", -2, frames()), ("image", -1, VIDEO["image/pixel_values"][0])],
)
def test_the_video_variant_answers_as_the_official_one(video_model, kind, media, shown):
    (prompt,) = collapsed(VIDEO[f"{kind}/input_ids"][0].tolist(), media=media)
    (answer,) = Generator(video_model).generate_ids([prompt], [[shown]], NEW)
    assert answer == META["video"][f"generate_{kind}"]["new_ids"]
    # The whole sequence at once gives the recorded scores of every step.
    model, ids = video_model.model, prompt + answer[:-1]
    with torch.no_grad():
        scores = whole_logits(video_model, ids, shown)[-NEW:]
    torch.testing.assert_close(scores, VIDEO[f"{kind}/scores"][0], atol=1e-4, rtol=0)
    assert model.model.vision.temporal


def whole_logits(loaded, ids, shown):
    """Logits [positions, vocabulary] of a sequence with one image or one video."""
    from megatron_owl2.data.image_tokens import expand_placeholders, vision_token_index

    model = loaded.model
    row = expand_placeholders(ids, loaded.config.tokens_per_image)
    tokens, modality = (torch.from_numpy(x)[None] for x in (row.tokens, row.modality))
    places = vision_token_index(modality)
    pixels = shown if shown.dim() == 4 else shown[None]
    x = model.merge(tokens, model.encode_images(pixels, len(pixels)), places)
    positions = torch.arange(tokens.shape[1])[None]
    x = model.hidden_states(x, modality, places, positions)
    return model.gather_logits(model.head(x))[:, 0]


def test_images_and_videos_of_several_lengths_are_encoded_together(video_model):
    generator = Generator(video_model)
    (prompt,) = collapsed(VIDEO["video/input_ids"][0].tolist(), media=-2)
    three, two = frames()[:3], frames()[2:]
    shown = [[frames()], [three], [VIDEO["image/pixel_values"][0]], [two], [frames()[:1]]]
    together = generator.generate_ids([prompt] * len(shown), shown, 4)
    alone = [generator.generate_ids([prompt], [images], 4)[0] for images in shown]
    assert together == alone
    # A video of one frame is an image.
    assert together[4] == generator.generate_ids([prompt], [[frames()[0]]], 4)[0]
