"""Sources of a whole model: its configuration and its lazy weights from any directory."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_owl2.config.model_differences import RUN_ONLY, model_differences
from megatron_owl2.config.schema import (
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    RunConfig,
)
from megatron_owl2.config.validate_model import validate_model
from megatron_owl2.convert import adapters, hf_config, mapping
from megatron_owl2.convert.hf_weights import read_hf
from megatron_owl2.convert.lazy_tensor import LazyTensor, of_model
from megatron_owl2.convert.megatron_io import read_checkpoint
from megatron_owl2.convert.peft_models import lacks_settings, read_without_settings
from megatron_owl2.convert.safetensors_io import ADAPTER_SETTINGS
from megatron_owl2.data.tokenizer import load_tokenizer
from megatron_owl2.errors import ConfigError, ConversionError, StorageError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model import position_tables
from megatron_owl2.model.abstractor import Abstractor
from megatron_owl2.model.layer_stack import weights
from megatron_owl2.model.owl2 import Owl2, build
from megatron_owl2.training.checkpoint import directories, save_load
from megatron_owl2.training.checkpoint.index import read_index

_SPLITTING = ("owl2", "llama")  # layouts whose branches a run may share, or begin alike


@dataclass(frozen=True)
class SourceModel:
    """A run's configuration for one process, and every weight of its model by our name."""

    config: RunConfig
    tensors: dict[str, LazyTensor]

    def merged(self, dtype: torch.dtype | None = None) -> "SourceModel":
        """The same model with its adapters, if any, merged into the weights, which become `dtype`
        then, or keep their own."""
        config = copy.deepcopy(self.config)
        config.stage.lora = LoraConfig()
        tensors = adapters.merge(self.tensors, config.model, self.config.stage.lora, dtype)
        return SourceModel(config, tensors)

    def build(self) -> Owl2:
        """The model in memory, cast to the precision of `config`."""
        (model,) = build(_context(self.config), self.config.model, initialize=False)
        with torch.no_grad():
            for name, tensor in weights(model).items():
                tensor.copy_(self.tensors[name].read())
        return model


def from_released(
    directory: str | Path,
    layout: str | None = None,
    *,
    config: RunConfig | None = None,
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    adapter_alpha: float | None = None,
) -> SourceModel:
    """A directory with a whole model in a released layout, which may be asked to be `layout`, with
    the adapters of a directory of peft if one is given.

    `config` supplies everything but the weights; its model section must agree with the directory,
    save for the image size, to which the position table is resized, a smaller max_positions,
    attention_dropout, vocab_multiple and, in the layout "owl2", modality_split, if the branches
    that it shares are equal.
    The tokenizer is `tokenizer` or the directory's own, if any. `stage.lora` becomes that of the
    adapters; `adapter_alpha` is for an `adapter` without settings (peft_models.py). Raises
    ConversionError.
    """
    layout = layout or hf_config.find_layout(directory)
    stored = hf_config.read_model(directory, layout)
    owners = {name: str(directory) for name in ("vision", "abstractor", "decoder")}
    given, config = config, _checked_config(config, stored, owners, layout)
    config.data.tokenizer = _find_tokenizer(tokenizer, directory, stored)
    grid, shapes = _stored_grid(stored, config), weight_shapes(config)
    tensors = read_hf(directory, layout, config.model, shapes, stored_grid=grid)
    if given is None:
        config.train.precision = _lossless_precision(tensors)
    if adapter is not None:
        if lacks_settings(adapter):
            bare = read_without_settings(adapter, directory, adapter_alpha)
            config.stage.lora, found = adapters.adapt(*bare, config.model)
        elif adapter_alpha is not None:
            raise ConversionError(
                f"{adapter} tells its alpha in {ADAPTER_SETTINGS}; leave out --adapter-alpha"
            )
        else:
            config.stage.lora, found = adapters.read_adapter(adapter, config.model)
        return SourceModel(config, {name: tensors[name] for name in shapes} | found)
    return SourceModel(config, {name: tensors[name] for name in shapes})


def from_llama_and_clip(
    language_model: str | Path,
    vision_model: str | Path,
    *,
    config: RunConfig | None = None,
    tokenizer: str | Path | None = None,
    seed: int = 1234,
) -> SourceModel:
    """The start of the first stage: a LLaMA, a CLIP ViT and a random abstractor between them.

    `config` says whether the model is mPLUG-Owl2, as without it, or version 1. Both branches of the
    modality-adaptive layers start from the LLaMA's weights. Otherwise as `from_released`; without
    `config` the abstractor has the paper's sizes. Its weights follow from `seed`.
    """
    stored = ModelConfig(
        vision=hf_config.read_clip(vision_model),
        decoder=hf_config.read_llama(language_model),
        **hf_config.read_image_settings(vision_model),
    )
    owners = {"vision": str(vision_model), "decoder": str(language_model)}
    given, config = config, _checked_config(config, stored, owners, "llama")
    config.data.tokenizer = _find_tokenizer(tokenizer, language_model, stored)
    grid, shapes = _stored_grid(stored, config), weight_shapes(config)
    tensors = read_hf(language_model, "llama", config.model, shapes)
    tensors |= read_hf(vision_model, "clip", config.model, shapes, stored_grid=grid)
    if given is None:
        config.train.precision = _lossless_precision(tensors)
    torch.manual_seed(seed)
    abstractor = of_model(Abstractor(_context(config), config.model))
    tensors |= {f"abstractor.{name}": tensor for name, tensor in abstractor.items()}
    return SourceModel(config, {name: tensors[name] for name in shapes})


def from_checkpoint(path: str | Path) -> SourceModel:
    """A checkpoint, or the latest of a run; raises CheckpointError."""
    directory = directories.resolve(path)
    config = directories.read_config(directory)
    config.parallel = ParallelConfig()
    tensors = read_checkpoint(directory)
    if absent := save_load.compare(directory, read_index(directory), weight_shapes(config)):
        made = mapping.constants(config.model)
        tensors |= {name: LazyTensor.of(made[name]) for name in absent}
    return SourceModel(config, tensors)


def _checked_config(
    config: RunConfig | None,
    stored: ModelConfig,
    owners: dict[str, str],
    layout: str,
) -> RunConfig:
    """The run configuration for one process, without adapters.

    Raises ConversionError if a section of its model differs from the directory that owns it.
    """
    config = copy.deepcopy(RunConfig(model=stored) if config is None else config)
    config.parallel, config.stage.lora = ParallelConfig(), LoraConfig()
    free = RUN_ONLY | {"model.vision.image_size"}
    free |= {"model.decoder.modality_split"} if layout in _SPLITTING else set()
    differences = []
    for name, (wanted, found) in model_differences(config.model, stored).items():
        owner = owners.get(name.split(".")[1])
        too_many = name == "model.decoder.max_positions" and wanted > found  # fewer are free
        if owner is not None and (too_many or name not in free):
            differences.append(f"{name}: {wanted} in the configuration, {found} in {owner}")
    if differences:
        raise ConversionError(
            "the configuration describes another model; change these keys:\n  "
            + "\n  ".join(differences)
        )
    validate_model(config.model)
    return config


def _lossless_precision(tensors: dict[str, LazyTensor]) -> Precision:
    """The narrowest precision that keeps every bit of weights in 32 bit or less."""
    dtypes = {tensor.dtype for name, tensor in tensors.items() if name not in position_tables.NAMES}
    return "bf16" if dtypes == {torch.bfloat16} else "fp32"


def _find_tokenizer(given: str | Path | None, directory: str | Path, stored: ModelConfig) -> str:
    """The path of the SentencePiece model, or "" if the directory has none and none is given."""
    path = Path(given) if given is not None else Path(directory) / "tokenizer.model"
    if given is None and not os.path.lexists(path):
        return ""
    try:
        load_tokenizer(path, stored.decoder.vocab_size)
    except (ConfigError, StorageError) as error:
        raise ConversionError(str(error)) from None
    return str(path)


def _context(config: RunConfig) -> ParallelContext:
    return ParallelContext(config, setup.initialize(ParallelConfig()))


def weight_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Every weight's shape, without memory for any."""
    context = _context(config)
    with torch.device("meta"):
        return save_load.global_shapes([Owl2(context, config.model)])


def _stored_grid(stored: ModelConfig, config: RunConfig) -> int | None:
    same = stored.vision.grid_size == config.model.vision.grid_size
    return None if same else stored.vision.grid_size
