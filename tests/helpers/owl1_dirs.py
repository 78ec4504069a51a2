"""The recorded directories of mPLUG-Owl, version 1, with the code that an export carries."""

import json
import shutil
from pathlib import Path

from paths import DATA

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.convert import hf_config
from megatron_owl2.convert.remote_files import write_remote_code

OFFICIAL = DATA / "official_v1_tiny"
META = json.loads((OFFICIAL / "meta.json").read_text())
ROWS = META["tokens_per_image"]


def edit(path: Path, **settings) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def with_code(directory: Path, video: bool = False, **processor) -> Path:
    """A copy of the recorded checkpoint, or of its video variant; `processor` are settings of
    processor_config.json."""
    shutil.copytree(OFFICIAL / ("hf_ckpt_video" if video else "hf_ckpt"), directory)
    if video:
        vision = json.loads((directory / "config.json").read_text())["vision_config"]
        edit(directory / "config.json", vision_config=vision | {"temporal": True})
        shutil.copy(OFFICIAL / "hf_ckpt" / "tokenizer.model", directory)
        processor = {"frames_per_video": 4} | processor
    model = ModelConfig()
    images = {
        "crop_size": {"height": 56, "width": 56},
        "image_mean": model.image_mean,
        "image_std": model.image_std,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    settings = {"processor_class": "MplugOwlProcessor", "tokens_per_image": ROWS} | processor
    (directory / "processor_config.json").write_text(json.dumps(settings))
    model.decoder.max_positions = 256
    hf_config.write_tokenizer(directory, model)
    write_remote_code(directory, "owl1")
    return directory
