"""MSRVTT-QA (Xu et al. 2017), test: 72,821 questions on videos `videos/videoNNNN.mp4`."""

from pathlib import Path

from megatron_owl2.evaluation import video_qa
from megatron_owl2.evaluation.benchmark import SHORT_ANSWER, Benchmark, Gold, Question
from megatron_owl2.evaluation.video_files import VideoFolder


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions, each on its video."""
    videos = VideoFolder(path)
    return video_qa.questions_on(gold, lambda row: videos.find(f"video{row['video_id']}"))


BENCHMARK = Benchmark(
    about="MSRVTT-QA, questions on videos",
    file="*test_qa.json",
    gold_file="*test_qa.json",
    id_field="id",
    answer_field="answer",
    suffix=SHORT_ANSWER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=video_qa.read_gold,
    score=video_qa.score,
    variants=video_qa.VARIANTS,
    columns=video_qa.COLUMNS,
    submission=video_qa.submission,
    unanswered_rows=True,
    judge=video_qa.JUDGE,
)
