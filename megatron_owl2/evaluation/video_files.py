"""Videos of a benchmark: files in `videos/` beside its question file, and which frames are shown.

Importing this needs neither PyAV nor torch; `video_frames` decodes.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.image_files import named_file, one_of_named
from megatron_owl2.utils.files import is_hidden

VIDEOS = "videos"  # folder beside the question file
_ENDINGS = {".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".gif"}


@dataclass(frozen=True)
class Video:
    """A video to be shown by `frames` of its frames, all in the place of one placeholder.

    Of a `segment` only the frames from its start up to its end are taken, in seconds or numbers of
    frames from 0; None is all of them. With `ends` the first and the last frame are among them. A
    `joined` video has the visual tokens of one image, for models with temporal adapters; else every
    frame has those of an image.
    """

    path: Path
    frames: int
    segment: tuple[float, float] | None = None
    unit: Literal["seconds", "frames"] = "seconds"
    ends: bool = False
    joined: bool = False

    @property
    def placeholders(self) -> int:
        """Placeholders in a prompt: one, or one for every frame."""
        return 1 if self.joined else self.frames


def frame_numbers(count: int, wanted: int, *, ends: bool = False) -> list[int]:
    """The numbers, from 0 and below `count`, of `wanted` frames at equal distances.

    mPLUG-Owl's rule: with s = (count - 1) / wanted, frame i is int(s / 2) + round(s i), so 1 is the
    middle one. With `ends` it is that of EgoSchema's code, numpy's linspace from the first to the
    last frame, rounded down. A video of fewer frames shows some twice.
    """
    if ends:
        step = (count - 1) / max(1, wanted - 1)
        return [int(step * i) for i in range(wanted - 1)] + [count - 1 if wanted > 1 else 0]
    step = (count - 1) / wanted
    return [int(step / 2) + round(step * i) for i in range(wanted)]


def named_video(questions: Path, name: str) -> Path:
    """A file in `videos/` by its path there, or by its name alone if it is not at that path."""
    return one_of_named(questions, name, Path(name).name, folder=VIDEOS)


class VideoFolder:
    """The videos beside a question file by their names without ending.

    Raises TaskError if there is no such folder.
    """

    def __init__(self, questions: Path):
        self._questions, self._folder = questions, questions.parent / VIDEOS
        if not self._folder.is_dir():
            raise TaskError(f"{self._folder} does not exist; the videos of {questions} go there")
        self._found: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(self._folder.iterdir()):
            if path.suffix.lower() in _ENDINGS and not is_hidden(path.name):
                self._found[path.stem].append(path)

    def find(self, *names: str) -> Path:
        """The video of the first of these names that is there, else a path for the first name.

        Raises TaskError for a name of two files, or that is none of a file.
        """
        for name in names:
            found = self._found.get(name, [])
            if len(found) > 1:
                raise TaskError(
                    f"{self._questions}: video {name!r} may be {found[0]} or {found[1]}; leave one "
                    "of them in the folder"
                )
            if found:
                return found[0]
        return named_file(self._questions, f"{names[0]}.mp4", VIDEOS)
