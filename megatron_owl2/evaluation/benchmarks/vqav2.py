"""VQAv2 (Goyal et al. 2017): open questions on COCO images, ten annotators' answers to each.

The answers of test2015 and test-dev2015 are not published; `--no-gold` asks these.
"""

from megatron_owl2.evaluation.benchmark import SHORT_ANSWER, Benchmark
from megatron_owl2.evaluation.vqa_accuracy import VARIANTS, evalai_submission, score
from megatron_owl2.evaluation.vqa_files import read_questions, read_vqav2_gold

BENCHMARK = Benchmark(
    about="VQAv2, open questions on images, scored per question type",
    file="*questions.json",
    gold_file="*annotations.json",
    id_field="question_id",
    answer_field="answer",
    suffix=SHORT_ANSWER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_vqav2_gold,
    score=score,
    variants=VARIANTS,
    submission=evalai_submission("question_id"),
)
