"""TGIF-QA (Jang et al. 2017), its FrameQA test: 13,691 questions on animated GIFs in `videos/`."""

from dataclasses import replace
from pathlib import Path

from megatron_owl2.evaluation import video_qa
from megatron_owl2.evaluation.benchmark import Gold, Question
from megatron_owl2.evaluation.benchmarks import msrvtt_qa
from megatron_owl2.evaluation.rows import read_rows, words
from megatron_owl2.evaluation.video_files import VideoFolder

_FIELDS = {"gif_name": words, "question": words, "answer": words}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions, each on its GIF."""
    videos = VideoFolder(path)
    return video_qa.questions_on(gold, lambda row: videos.find(row["gif_name"]))


def read_gold(path: Path) -> Gold:
    """The rows by their place in the file, from 0."""
    return {
        i: row | {"skill": video_qa.kind(row["question"])}
        for i, row in enumerate(read_rows(path, _FIELDS))
    }


BENCHMARK = replace(
    msrvtt_qa.BENCHMARK,
    about="TGIF-QA FrameQA, questions on animated GIFs",
    file="*[fF]rame[qQ][aA]*.[ct]sv",
    gold_file="*[fF]rame[qQ][aA]*.[ct]sv",
    read_questions=read_questions,
    read_gold=read_gold,
)
