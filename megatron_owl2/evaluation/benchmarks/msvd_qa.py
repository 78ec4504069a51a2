"""MSVD-QA (Xu et al. 2017), test: 13,157 questions on videos.

The rows number the videos, whose files are called `vidN` or as `youtube_mapping.txt`, a file beside
the questions, translates that.
"""

from dataclasses import replace
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import video_qa
from megatron_owl2.evaluation.benchmark import Gold, Question
from megatron_owl2.evaluation.benchmarks import msrvtt_qa
from megatron_owl2.evaluation.table_files import read_lines
from megatron_owl2.evaluation.video_files import VideoFolder

MAPPING = "youtube_mapping.txt"


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions, each on its video; raises TaskError for a mapping that cannot be read."""
    videos, names = VideoFolder(path), _names(path.parent / MAPPING)

    def find(row) -> Path:
        number = f"vid{row['video_id']}"
        return videos.find(*names.get(number, ()), number, str(row["video_id"]))

    return video_qa.questions_on(gold, find)


def _names(mapping: Path) -> dict[str, tuple[str]]:
    """{number: name of the file}, {} without a mapping."""
    names = {}
    for place, fields in read_lines(mapping, " ") if mapping.is_file() else []:
        if len(fields) != 2:
            raise TaskError(f"{mapping}: {place} must be a name and a number such as vid1")
        names[fields[1]] = (fields[0],)
    return names


BENCHMARK = replace(
    msrvtt_qa.BENCHMARK, about="MSVD-QA, questions on videos", read_questions=read_questions
)
