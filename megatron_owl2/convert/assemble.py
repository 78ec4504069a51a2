"""A whole model in one process with the configuration of its checkpoint, ready to convert."""

import copy
import dataclasses
from pathlib import Path

import torch

from megatron_owl2 import mcore
from megatron_owl2.checks import check_model
from megatron_owl2.config import ModelConfig, ParallelConfig, RunConfig
from megatron_owl2.convert import hf_config
from megatron_owl2.convert.hf import load_hf_weights
from megatron_owl2.convert.weights import ConversionError
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training import checkpoint

# What a run chooses whatever the weights are; max_positions may also be smaller than theirs.
_FREE = {
    "vision": {"image_size", "position_init_std"},
    "abstractor": {"attention_init_std"},
    "decoder": set(),
}


def from_owl2(
    directory: str | Path,
    *,
    config: RunConfig | None = None,
    tokenizer: str | Path | None = None,
    progress: bool = False,
) -> tuple[Owl2, RunConfig]:
    """The model of a directory in the released layout.

    `config` supplies everything but the weights; its model section must agree with the directory,
    save for the image size, to which the position table is resized, and a smaller max_positions.
    The tokenizer is `tokenizer` or the directory's own, if any. Raises ConversionError.
    """
    stored = hf_config.read_owl2(directory)
    owners = dict.fromkeys(_FREE, str(directory))
    config = _agreed(config, stored, owners)
    config.data.tokenizer = _find_tokenizer(tokenizer, directory, stored)
    model = _build(config)
    grid = _stored_grid(stored, config)
    load_hf_weights(directory, model, "owl2", stored_grid=grid, progress=progress)
    return model, config


def from_parts(
    language_model: str | Path,
    vision_model: str | Path,
    *,
    config: RunConfig | None = None,
    tokenizer: str | Path | None = None,
    seed: int = 1234,
    progress: bool = False,
) -> tuple[Owl2, RunConfig]:
    """The start of the first stage: a LLaMA, a CLIP ViT and a random abstractor between them.

    Both branches of the modality-adaptive layers start from the LLaMA's weights. Otherwise as
    `from_owl2`; without `config` the abstractor has the paper's sizes. Its weights follow from
    `seed`.
    """
    stored = ModelConfig(
        vision=hf_config.read_clip(vision_model), decoder=hf_config.read_llama(language_model)
    )
    stored.image_mean, stored.image_std = hf_config.read_image_statistics(vision_model)
    owners = {"vision": str(vision_model), "decoder": str(language_model)}
    config = _agreed(config, stored, owners)
    config.data.tokenizer = _find_tokenizer(tokenizer, language_model, stored)
    torch.manual_seed(seed)
    model = _build(config)
    grid = _stored_grid(stored, config)
    load_hf_weights(language_model, model, "llama", progress=progress)
    load_hf_weights(vision_model, model, "clip", stored_grid=grid, progress=progress)
    return model, config


def from_checkpoint(path: str | Path) -> tuple[Owl2, RunConfig]:
    """The whole model of a checkpoint (or the latest of a run) in one process.

    Raises CheckpointError.
    """
    config = checkpoint.read_config(path)
    config.parallel = ParallelConfig()
    model = _build(config)
    checkpoint.load_weights(path, model)
    return model, config


def _agreed(
    config: RunConfig | None,
    stored: ModelConfig,
    owners: dict[str, str],
) -> RunConfig:
    """The run configuration for one process, each section of its model held against the
    directory that owns it."""
    if config is None:
        dtypes = {hf_config.source_dtype(directory) for directory in owners.values()}
        config = RunConfig(model=stored)
        config.train.precision = "bf16" if dtypes == {"bfloat16"} else "fp32"  # loses nothing
    config = copy.deepcopy(config)
    config.parallel = ParallelConfig()
    differences = []
    for section, directory in owners.items():
        ours, theirs = getattr(config.model, section), getattr(stored, section)
        for name in (f.name for f in dataclasses.fields(ours)):
            wanted, found = getattr(ours, name), getattr(theirs, name)
            fits = wanted <= found if name == "max_positions" else wanted == found
            if not fits and name not in _FREE[section]:
                differences.append(
                    f"model.{section}.{name}: {wanted} in the configuration, {found} in {directory}"
                )
    if differences:
        raise ConversionError(
            "the configuration describes another model; change these keys:\n  "
            + "\n  ".join(differences)
        )
    check_model(config.model)
    return config


def _find_tokenizer(given: str | Path | None, directory: str | Path, stored: ModelConfig) -> str:
    """The path of the SentencePiece model, or "" if the directory has none and none is given."""
    path = Path(given) if given is not None else Path(directory) / "tokenizer.model"
    if given is None and not path.is_file():
        return ""
    try:
        pieces = Tokenizer(path).vocab_size
    except (FileNotFoundError, ValueError) as error:
        raise ConversionError(str(error)) from None
    if pieces > stored.decoder.vocab_size:
        raise ConversionError(
            f"{path} has {pieces} pieces, the embedding only {stored.decoder.vocab_size} rows; "
            "give the tokenizer of this model"
        )
    return str(path)


def _build(config: RunConfig) -> Owl2:
    groups = mcore.initialize(1, 1)
    return Owl2(mcore.Layout(config, groups), config.model)


def _stored_grid(stored: ModelConfig, config: RunConfig) -> int | None:
    same = stored.vision.grid_size == config.model.vision.grid_size
    return None if same else stored.vision.grid_size
