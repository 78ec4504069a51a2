"""Reading of images: random ones like photographs, and the ways to batches that are compared."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import webdataset
from PIL import Image

from megatron_owl2.config.schema import DataConfig, SourceConfig
from megatron_owl2.config.templates import OWL2
from megatron_owl2.data import images, jpeg
from megatron_owl2.data.loader import BatchLoader, build_loader
from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.data.sampling.keyed_random import KeyedRandom
from megatron_owl2.data.sampling.phases import first_phase
from megatron_owl2.data.shards.dataset import open_sources
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.data.training_order import TrainingOrder

BATCH = 32
WORDS = ["a", "the", "owl", "on", "red", "blue", "tree", "sky", "two", "big", "small", "photo"]


def make_records(count: int, width: int, height: int) -> Iterator[Record]:
    """Images like photographs in size as JPEG and in smoothness: coloured noise and edges."""
    chance = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    for index in range(count):
        noise = np.fft.rfft2(chance.standard_normal((4, height, width))) / frequency**1.4
        grey, *colour = np.fft.irfft2(noise, s=(height, width))
        image = 128 + 40 * grey / grey.std() + 8 * np.stack(colour) / np.std(colour)
        top, left = chance.integers(0, height // 2), chance.integers(0, width // 2)
        image[:, top : top + height // 3, left : left + width // 3] += 60
        pixels = image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        caption = " ".join(chance.choice(WORDS, 12))
        yield Record(f"{index:09d}", images=(buffer.getvalue(),), caption=caption, source="bench")


def make_tokenizer(folder: Path) -> Tokenizer:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return Tokenizer(folder / "tokenizer.model")


def open_ours(
    shards: Path,
    tokenizer: Tokenizer,
    samples: int | None,
    size: int,
    workers: int,
    scaled: bool = False,
) -> BatchLoader:
    config = DataConfig(
        sources=[SourceConfig(str(shards))],
        workers=workers,
        augment=True,
        scaled_decoding=scaled,
        sequence_length=128,
    )
    datasets = open_sources(config)
    return build_loader(
        config,
        datasets,
        TrainingOrder(config, datasets, first_phase(config, datasets)),
        SampleBuilder(tokenizer, OWL2, 65, size, config.sequence_length, max_images=1),
        row_alignment=config.sequence_length,
        micro_batch_size=BATCH,
        start_sample=0,
        data_parallel_rank=0,
        data_parallel_size=1,
        limit_samples=None if samples is None else samples // BATCH * BATCH,
    )


def read_ours(
    shards: Path, tokenizer: Tokenizer, samples: int, size: int, scaled: bool = False
) -> None:
    for batch in open_ours(shards, tokenizer, samples, size, workers=0, scaled=scaled):
        assert batch.image.shape == (BATCH, 3, size, size)


def read_webdataset(
    urls: list[str],
    decoder: str | Callable,
    crop: Callable[..., torch.Tensor],
    size: int,
) -> None:
    """The pipeline of webdataset's manual: shards, a shuffle buffer, decoders, batches."""
    chance = KeyedRandom(1)
    data = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode(decoder)
    pairs = data.to_tuple("jpg", "json").map_tuple(
        lambda image: crop(image, size, chance), lambda text: text["caption"]
    )
    for stacked, _ in pairs.batched(BATCH, partial=False):
        assert stacked.shape == (BATCH, 3, size, size)


def pillow_crop(image: Image.Image, size: int, chance: KeyedRandom) -> torch.Tensor:
    """Random resized crop and flip, all in Pillow, as torchvision does it."""
    top, left, height, width = images.random_crop(image.height, image.width, chance)
    box = (left, top, left + width, top + height)
    image = image.resize((size, size), Image.BICUBIC, box=box)
    if chance.uniform() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def scaled_differences(records: list[Record], size: int) -> dict[str, dict[str, float]]:
    """Levels of 255 by which scaled decoding changes pixels, in all and but for the crops' rounded
    edges, and pixels of the whole image by which the rounding moves the centres of the crops."""
    whole, resampled, moved = [], [], []
    for number, record in enumerate(records):
        data = record.images[0]
        one, other = (
            images.load_square(data, size, KeyedRandom(number), scaled) for scaled in (True, False)
        )
        whole.append(one.int() - other.int())
        width, height = images.image_size(data)
        crop = images.random_crop(height, width, KeyedRandom(number))
        factor, reduced = images.reduce_crop(crop, size)
        near = tuple(factor * edge for edge in reduced)
        pixels = torch.from_numpy(jpeg.decode(data, factor)).permute(2, 0, 1)
        one, other = cut(pixels, reduced, size), cut(images.decode(data), near, size)
        resampled.append(one.int() - other.int())
        moved += [
            near[axis] + near[2 + axis] / 2 - crop[axis] - crop[2 + axis] / 2 for axis in (0, 1)
        ]
    return {
        "all": levels(torch.stack(whole)),
        "resampling": levels(torch.stack(resampled)),
        "centres": {
            "mean": float(np.mean(moved)),
            "rms": float(np.sqrt(np.mean(np.square(moved)))),
        },
    }


def cut(image: torch.Tensor, crop: images.Crop, size: int) -> torch.Tensor:
    top, left, height, width = crop
    return images.resize_square(image[:, top : top + height, left : left + width], size)


def levels(difference: torch.Tensor) -> dict[str, float]:
    size = difference.abs().flatten().numpy()
    return {
        "mean": float(size.mean()),
        "percentile_99": float(np.percentile(size, 99)),
        "max": float(size.max()),
        "bias": float(difference.float().mean()),
    }
