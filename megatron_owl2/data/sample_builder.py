"""Builder of samples from records: text to ids, image files to pixels, as one model takes them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.config.templates import Template
from megatron_owl2.data import images
from megatron_owl2.data.conversation import Sample, build_sample
from megatron_owl2.data.image_resize import SquareResize
from megatron_owl2.data.sampling.keyed_random import KeyedRandom
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import BadSampleError

_AUGMENT = 16  # keeps the crops' keys apart from the order's


@dataclass(frozen=True)
class SampleBuilder:
    """Builder of samples of `sequence_length` positions and `max_images` images at most.

    With `decode_images=False` images are only checked: a rank that needs no pixels must find the
    same samples unusable as the ranks with pixels.
    """

    tokenizer: Tokenizer
    template: Template
    tokens_per_image: int
    image_size: int
    sequence_length: int
    max_images: int
    decode_images: bool = True
    to_square: SquareResize = images.STRETCH

    @classmethod
    def of(
        cls, config: RunConfig, tokenizer: Tokenizer, *, decode_images: bool = True
    ) -> "SampleBuilder":
        """The builder for a run's model and rows."""
        return cls(
            tokenizer,
            config.model.conversation,
            config.model.tokens_per_image,
            config.model.vision.image_size,
            config.data.sequence_length,
            config.data.images_per_row,
            decode_images,
            images.square_resize(config.model),
        )

    @property
    def blank_size(self) -> int:
        """Sides of the black image of a batch without any."""
        return self.image_size if self.decode_images else 0

    def build(
        self,
        record: Record,
        measured: dict[str, float],
        augmentation: "Augmentation | None" = None,
        beside: Sequence[Sample] = (),
    ) -> Sample:
        """The sample of a record, and seconds of decoding added to `measured`; `beside` are those
        that a packed row has already. Raises BadSampleError if it cannot be used, or has no room
        there, since it is not as it was measured."""
        sample = build_sample(
            record,
            self.tokenizer,
            self.tokens_per_image,
            self.sequence_length,
            self.template,
            self.max_images,
        )
        positions = sum(other.length for other in beside) + sample.length
        images_in_row = sum(other.image_count for other in beside) + sample.image_count
        if positions > self.sequence_length or images_in_row > self.max_images:
            raise BadSampleError(
                "longer than when its data set's lengths were measured; measure them again with "
                "owl2 measure-lengths"
            )
        started = time.perf_counter()
        for number, data in enumerate(record.images[: sample.image_count]):
            sample.images.append(self._image(data, number, augmentation))
        measured["decode_seconds"] += time.perf_counter() - started
        sample.key = record.key
        return sample

    def _image(self, data: bytes, number: int, augmentation: "Augmentation | None") -> torch.Tensor:
        if not self.decode_images:
            images.check(data)
            return torch.empty(3, 0, 0, dtype=torch.uint8)
        size, to_square = self.image_size, self.to_square
        if augmentation is None:
            return images.load_square(data, size, to_square=to_square)
        random, scaled = augmentation.random(number), augmentation.scaled_decoding
        return images.load_square(data, size, random, scaled, to_square)


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of the images of one sample, a function of `seed` and `sample_index`; without
    `crops` only the decoding may be `scaled_decoding`."""

    seed: int
    sample_index: int
    crops: bool
    scaled_decoding: bool

    def random(self, number: int) -> KeyedRandom | None:
        """What crop and flip of image `number` are drawn from."""
        if not self.crops:
            return None
        further = (number,) if number else ()
        return KeyedRandom(self.seed, _AUGMENT, self.sample_index, *further)
