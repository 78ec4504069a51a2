"""A corpus and a random model for tests of whole evaluations, and questions about images."""

import json
from pathlib import Path

import torch
from PIL import Image

from data_prep import shapes
from megatron_owl2.config.schema import (
    AbstractorConfig,
    DecoderConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    VisionConfig,
)
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training.checkpoint.manager import CheckpointManager


def build_corpus(folder: Path) -> Path:
    shapes.build_corpus(folder, shapes.Parameters(pairs=40, instructions=40, texts=60, eval=12))
    return folder


def build_model(tokenizer: Path, run: Path, seed: int = 1) -> Path:
    """A run directory with a checkpoint of a random model."""
    model = ModelConfig(
        vision=VisionConfig(28, 14, 32, 1, 2, 32),
        abstractor=AbstractorConfig(4, 1, 2, 32),
        decoder=DecoderConfig(Tokenizer(tokenizer).vocab_size, 32, 1, 2, 2, 32, max_positions=512),
    )
    config = RunConfig(model=model)
    config.data.tokenizer = str(tokenizer)
    config.train.precision = "fp32"
    torch.manual_seed(seed)
    owl = Owl2(ParallelContext(config, setup.initialize(ParallelConfig())), model)
    config.train.async_save = False
    CheckpointManager(run, config.train).save(1, [owl], config)
    return run


def write_vqa(folder: Path) -> Path:
    """Three questions on two images named as COCO names them; the first two on image 7."""
    (folder / "images").mkdir(parents=True)
    for number, color in ((7, "red"), (12, "blue")):
        name = f"COCO_val2014_{number:012d}.jpg"
        Image.new("RGB", (20, 30), color).save(folder / "images" / name, quality=95)
    asked = [(1, 7, "color", "red"), (2, 7, "count", "2"), (3, 12, "color", "blue")]
    questions = [
        {"question_id": i, "image_id": image, "question": f"what {kind}?"}
        for i, image, kind, _ in asked
    ]
    annotations = [
        {
            "question_id": i,
            "image_id": image,
            "question_type": kind,
            "multiple_choice_answer": gold,
            "answers": [{"answer": gold, "answer_id": k} for k in range(10)],
        }
        for i, image, kind, gold in asked
    ]
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    (folder / name).write_text(json.dumps({"questions": questions}))
    name = "v2_mscoco_val2014_annotations.json"
    (folder / name).write_text(json.dumps({"annotations": annotations}))
    return folder
