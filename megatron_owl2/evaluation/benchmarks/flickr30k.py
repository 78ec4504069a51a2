"""Captions of Flickr30K's 1,000 images in Karpathy's test split, scored by CIDEr-D.

The file is Karpathy's dataset_flickr30k.json or Qwen-VL's flickr30k_karpathy_test.json, which
mPLUG-Owl2's evaluation reads; images are looked for by their names in images/.
"""

from dataclasses import replace

from megatron_owl2.evaluation.benchmarks import coco_caption

BENCHMARK = replace(
    coco_caption.BENCHMARK,
    about="Flickr30K captions, Karpathy's test split, CIDEr-D",
    file="*flickr30k*.json",
    gold_file="*flickr30k*.json",
)
