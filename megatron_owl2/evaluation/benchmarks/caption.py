"""Image captions in the format of COCO, scored by exact match with one of the references."""

from megatron_owl2.evaluation.benchmark import Benchmark
from megatron_owl2.evaluation.caption_files import read_coco, read_questions
from megatron_owl2.evaluation.scoring import exact_match

BENCHMARK = Benchmark(
    about="captions in COCO's format, exact match with any of an image's",
    file="captions*.json",
    gold_file="captions*.json",
    id_field="image_id",
    answer_field="caption",
    suffix="",
    max_new_tokens=60,
    min_new_tokens=8,
    read_questions=read_questions,
    read_gold=read_coco,
    score=exact_match,
)
