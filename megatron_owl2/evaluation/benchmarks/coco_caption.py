"""Captions of COCO's 5,000 images in Karpathy's test split, scored by CIDEr-D.

The file is Karpathy's dataset_coco.json, or one in COCO's format with these images alone. Images
are looked for in images/val2014/ and images/.
"""

from megatron_owl2.evaluation.benchmark import Benchmark
from megatron_owl2.evaluation.caption_files import read_gold, read_questions
from megatron_owl2.evaluation.captions import VARIANTS, score, submission

BENCHMARK = Benchmark(
    about="COCO captions, Karpathy's test split, CIDEr-D",
    file="*coco*.json",
    gold_file="*coco*.json",
    id_field="image_id",
    answer_field="caption",
    suffix="",
    max_new_tokens=60,
    min_new_tokens=8,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=VARIANTS,
    columns=("cider_d", "n"),
    submission=submission,
    unanswered_rows=True,
    split="test",
)
