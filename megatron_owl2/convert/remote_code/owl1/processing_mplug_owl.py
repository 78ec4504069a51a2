"""Texts, images and videos to the inputs of mPLUG-Owl, version 1."""

from itertools import repeat

import numpy as np
import torch
from transformers import BatchFeature

from .processing_mplug_owl2 import MPLUGOwl2Processor
from .prompt_mplug_owl import (
    IMAGE,
    IMAGE_ID,
    SYSTEM,
    TOKENIZATIONS,
    VIDEO,
    VIDEO_ID,
    default_chat_template,
    prompt_ids,
)

# transformers 5.4 copies what a file imports itself, and not what those files import.
from .prompt_mplug_owl2 import is_rendered  # noqa: F401
from .text_options_mplug_owl2 import TextOptions


class MplugOwlProcessor(MPLUGOwl2Processor):
    """Tokenizer and image processor, and the rows that an image or a video takes in the text.

    `tokenization` is one of prompt_mplug_owl.py, by default that of the released processor;
    `frames_per_video` is that of the video variant. Raises ValueError for another tokenization.
    """

    row_ids = {IMAGE_ID: IMAGE_ID, VIDEO_ID: VIDEO_ID}

    def __init__(
        self,
        image_processor,
        tokenizer,
        tokens_per_image=65,
        system=SYSTEM,
        tokenization="official_inference",
        frames_per_video=None,
        chat_template=None,
    ):
        if tokenization not in TOKENIZATIONS:
            raise ValueError(
                f"tokenization is {tokenization!r}; it must be one of {', '.join(TOKENIZATIONS)}"
            )
        videos = frames_per_video is not None
        template = chat_template or default_chat_template(system, tokenization, videos)
        super().__init__(
            image_processor, tokenizer, tokens_per_image, system, chat_template=template
        )
        self.tokenization, self.frames_per_video = tokenization, frames_per_video

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Those of media in a plain string, images first."""
        return (IMAGE,) if self.frames_per_video is None else (IMAGE, VIDEO)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "video_pixel_values"]

    def __call__(self, images=None, text=None, videos=None, audio=None, **keywords) -> BatchFeature:
        """As in version 2, with `<image>` for an image and `<|video|>` for a video.

        videos: those of the placeholders in order, flat, or one list for each text. A video is a
        list of frames, each what the image processor takes, or uint8 [frames, H, W, 3]; of any
        other number than `frames_per_video` as many are taken as the released code takes.
        input_ids are -1 at the rows of images and -2 at those of videos; there is no modality.
        Beside them are pixel_values [n, 3, H, W] and video_pixel_values [n, 3, T, H, W], if there
        are any. Raises ValueError for videos that this model does not read, too.
        """
        if audio is not None:
            raise ValueError("this model reads no audio")
        options = TextOptions.of(self.tokenizer, keywords)
        texts, frames = self._texts_and_frames(text, images)
        clips = self._clips(videos, sum(entry.count(VIDEO) for entry in texts))
        rows_of_images = iter([len(group) * self.tokens_per_image for group in frames])
        sizes = {IMAGE_ID: rows_of_images, VIDEO_ID: repeat(self.tokens_per_image)}
        data = self._columns(texts, sizes, options)
        del data["modality"]
        if frames:
            data["pixel_values"] = self._pixels(sum(frames, []), options)
        if clips:
            values = [self.image_processor(clip)["pixel_values"].transpose(0, 1) for clip in clips]
            data["video_pixel_values"] = (
                torch.stack(values) if options.return_tensors else [v.numpy() for v in values]
            )
        return BatchFeature(data, tensor_type=options.return_tensors)

    def _clips(self, videos, placeholders: int) -> list[list]:
        """The frames of every video that the model reads."""
        if videos is not None and self.frames_per_video is None:
            raise ValueError("this model reads no videos; give their frames as images")
        found = _videos(videos)
        if len(found) != placeholders:
            raise ValueError(
                f"{placeholders} placeholders {VIDEO}, but {len(found)} videos; write one "
                "placeholder for each video"
            )
        return [_sampled(video, self.frames_per_video) for video in found]

    def _prompt_ids(self, marked: str, add_bos: bool) -> list[int]:
        return prompt_ids(marked, self.tokenizer, self.tokenization, add_bos)


def _videos(videos) -> list[list]:
    """Lists of frames, from one video, several, or a list of them for each text."""
    if videos is None:
        return []
    array = _is_video_array(videos)
    if not array and not isinstance(videos, (list, tuple)):
        raise ValueError(
            f"a video is of type {type(videos).__name__}; give a list of its frames, as images"
        )
    nested = [entry is None or isinstance(entry, (list, tuple)) for entry in videos]
    if array or not any(nested) and not any(map(_is_video_array, videos)):
        return [list(videos)] if len(videos) else []
    return [video for entry in videos for video in _videos(entry)]


def _is_video_array(value) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 4


def _sampled(frames: list, count: int) -> list:
    """The middle frames of `count` equal parts of a video, as the released code chooses them."""
    if len(frames) == count:
        return frames
    step = (len(frames) - 1) / count
    return [frames[int(step / 2) + round(step * i)] for i in range(count)]
