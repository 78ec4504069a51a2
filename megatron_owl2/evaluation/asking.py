"""Batches of questions, the share of each data-parallel group, and the images that are shown."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.data import images
from megatron_owl2.errors import BadSampleError, InferenceError, TaskError
from megatron_owl2.evaluation.question import Image, Question, file_of
from megatron_owl2.evaluation.video_files import Video
from megatron_owl2.evaluation.video_frames import read_frames

ImageReader = Callable[[Image], list[torch.Tensor]]  # of an image, or of the frames of a video


def batches_of(questions: Sequence[Question], size: int) -> list[range]:
    """The places of the questions in batches of `size`, the last of which may be smaller. A
    conversation ends in the batch in which it begins, which may be larger."""
    batches, end = [], 0
    while end < len(questions):
        first, end = end, min(end + size, len(questions))
        while end < len(questions) and questions[end].follows is not None:
            end += 1
        batches.append(range(first, end))
    return batches


def share_of(batches: int, finished: Collection[int], group: int, groups: int) -> list[int]:
    """The batches that a data-parallel group asks: of those that are not finished every
    `groups`-th.

    Batches stay whole, and so as they are in one process: what a batch is filled up with could
    change the last digit of a logit.
    """
    return [batch for batch in range(batches) if batch not in finished][group::groups]


def images_of(question: Question, read: ImageReader) -> list[torch.Tensor]:
    """The images of a question; raises TaskError naming the one that cannot be read."""
    shown = []
    for image in question.images:
        try:
            shown += read(image)
        except (OSError, BadSampleError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise TaskError(
                f"{place_of_image(image)}: {reason} (the image of question {question.id!r})"
            ) from None
    return shown


@contextmanager
def naming(questions: Sequence[Question]) -> Iterator[None]:
    """Context in which errors of inference, which number prompts, say the questions as well."""
    try:
        yield
    except InferenceError as error:
        first, last = questions[0].id, questions[-1].id
        raise InferenceError(f"{error} (of the questions {first!r} to {last!r})") from None


def place_of_image(image: Image) -> str:
    """Where an image or video lies, for rows and messages."""
    file = file_of(image)
    return str(file.resolve()) if file else "inside the question file"


def image_reader(model: ModelConfig, cached: int, *, blind: bool) -> ImageReader:
    """A reader of images and frames [3, size, size] in uint8, black ones if `blind`, with a cache:
    questions about one image that follow each other get the same tensor object, which the generator
    encodes once. The frames of a joined video are one tensor [frames, 3, size, size], a single one
    is an image."""
    size, to_square = model.vision.image_size, images.square_resize(model)
    black = torch.zeros(3, size, size, dtype=torch.uint8)

    @lru_cache(maxsize=cached)
    def read(image: Image) -> list[torch.Tensor]:
        if isinstance(image, Video):
            frames = [black] * image.frames
            if not blind:
                frames = [to_square(frame, size) for frame in read_frames(image)]
            return [torch.stack(frames)] if image.joined and len(frames) > 1 else frames
        if blind:
            return [black]
        data = image.read_bytes() if isinstance(image, Path) else image
        return [images.load_square(data, size, to_square=to_square)]

    return read
