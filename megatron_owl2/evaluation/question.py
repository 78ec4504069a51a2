"""A question of a benchmark: its text, what is shown with it, and texts that may be compared."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_owl2.config.templates import OWL2, Template
from megatron_owl2.data.conversation import prompt
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.likelihood import Candidates
from megatron_owl2.evaluation.prompts import OFFICIAL_USER
from megatron_owl2.evaluation.rows import Id
from megatron_owl2.evaluation.video_files import Video

Image = Path | bytes | Video  # a file, a file's content, or a video of several frames


@dataclass(frozen=True)
class Question:
    """One thing to ask: `images` are paths, or files' bytes where the benchmark holds them inside,
    or videos, and `gold` is the answer to show beside the model's, None if it was never published.
    The images come before the text, unless it is `placed`: then it has a placeholder for each of
    them. One placeholder stands for all frames of a video. With `candidates` the most likely of
    them is the answer, by its letter, and nothing is generated. `follows` is the question before
    it in a conversation about the same images, which are shown with the first one only."""

    id: Id
    text: str
    images: tuple[Image, ...]
    skill: str
    gold: str | None
    placed: bool = False
    candidates: Candidates | None = None
    follows: Id | None = None

    @property
    def placeholders(self) -> int:
        """Placeholders in its prompt, for images and frames."""
        return sum(_placeholders(image) for image in self.images)

    def prompt(self, suffix: str, template: Template = OWL2) -> str:
        """The prompt of the model's template, images first, up to `ASSISTANT:`."""
        return prompt(self.with_placeholders() + suffix, template)

    def official_prompt(self, suffix: str, assistant: str) -> str:
        """The prompt of published evaluation code, whose white space is kept as it is."""
        return OFFICIAL_USER + self.with_placeholders() + suffix + assistant

    def for_candidates(self) -> "list[Question]":
        """The questions behind which the candidates' texts stand, if these are in the template."""
        if self.candidates is None or not self.candidates.in_template:
            return []
        return [
            replace(self, text=context, candidates=None) for context, _ in self.candidates.pairs
        ]

    def with_placeholders(self) -> str:
        """The text with a placeholder for every image, and for every frame of a video next to each
        other: to the model that is one placeholder with the rows of all frames, as the official
        code takes a list of frames. A joined video has just one."""
        before = "" if self.placed else IMAGE_PLACEHOLDER * len(self.images)
        text, *pieces = (before + self.text).split(IMAGE_PLACEHOLDER)
        for image, piece in zip(self.images, pieces, strict=True):
            text += IMAGE_PLACEHOLDER * _placeholders(image) + piece
        return text


def _placeholders(image: Image) -> int:
    return image.placeholders if isinstance(image, Video) else 1


def file_of(image: Image) -> Path | None:
    """The file of an image or video, None for an image inside the benchmark's own file."""
    if isinstance(image, Video):
        return image.path
    return image if isinstance(image, Path) else None


def frames_shown(questions: Sequence[Question]) -> int | None:
    """Frames of each video, None without videos."""
    return max((video.frames for video in _videos(questions)), default=None)


def showing(questions: Sequence[Question], frames: int) -> list[Question]:
    """The questions with `frames` of every video; raises TaskError if there is none."""
    if not _videos(questions):
        raise TaskError("frames are of videos, and no question of this task and folder has one")
    return _with_videos(questions, frames=frames)


def alone(questions: Sequence[Question]) -> list[Question]:
    """The questions without their conversations: each is asked as a first one."""
    return [replace(question, follows=None) for question in questions]


def joining(questions: Sequence[Question]) -> list[Question]:
    """The questions with every video as one input that takes the place of one image."""
    return _with_videos(questions, joined=True)


def spread_to_ends(questions: Sequence[Question]) -> list[Question]:
    """The questions with the first and the last frame among those of every video."""
    return _with_videos(questions, ends=True)


def _with_videos(questions: Sequence[Question], **changes) -> list[Question]:
    return [
        replace(
            question,
            images=tuple(
                replace(image, **changes) if isinstance(image, Video) else image
                for image in question.images
            ),
        )
        for question in questions
    ]


def _videos(questions: Sequence[Question]) -> list[Video]:
    return [image for q in questions for image in q.images if isinstance(image, Video)]
