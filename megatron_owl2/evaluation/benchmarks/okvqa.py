"""OK-VQA (Marino et al. 2019): questions on COCO images that need knowledge from elsewhere."""

from megatron_owl2.evaluation.benchmark import SHORT_ANSWER, Benchmark
from megatron_owl2.evaluation.vqa_accuracy import VARIANTS, score
from megatron_owl2.evaluation.vqa_files import read_okvqa_gold, read_questions

BENCHMARK = Benchmark(
    about="OK-VQA, questions that need outside knowledge, scored per category",
    file="*questions.json",
    gold_file="*annotations.json",
    id_field="question_id",
    answer_field="answer",
    suffix=SHORT_ANSWER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_okvqa_gold,
    score=score,
    variants=VARIANTS,
)
