"""A model for inference from a checkpoint or an HF export, its adapters merged into its weights."""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from megatron_owl2.config.fields import choice_misfit
from megatron_owl2.config.schema import (
    KernelConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    RunConfig,
)
from megatron_owl2.config.validate_parallel import validate_parallel
from megatron_owl2.convert import adapters, hf_config, sources
from megatron_owl2.convert.hf_weights import load_hf_weights
from megatron_owl2.convert.lazy_tensor import LazyTensor
from megatron_owl2.convert.partition import shard
from megatron_owl2.data.tokenizer import Tokenizer, load_tokenizer
from megatron_owl2.errors import ConfigError, InferenceError
from megatron_owl2.inference.elementwise import InferenceElementwise
from megatron_owl2.inference.linear import InferenceLinear
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.linear import ColumnLinear, RowLinear
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.layer_stack import weights
from megatron_owl2.model.owl2 import Owl2, build
from megatron_owl2.training.checkpoint import directories, save_load
from megatron_owl2.training.from_rank_0 import from_rank_0


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its sizes, and its tokenizer."""

    model: Owl2
    config: ModelConfig
    tokenizer: Tokenizer


def load_model(
    path: str | Path,
    precision: Precision = "fp32",
    *,
    adapter: str | Path | None = None,
    tensor_parallel: int | None = None,
) -> LoadedModel:
    """The model of a checkpoint (run directory, its `checkpoints/` or one `iter_*`) or HF export.

    Under torchrun the weights are split over `tensor_parallel` of its processes, over all if it is
    None, and these must make the same calls; each other group of as many has the whole model, too.
    `precision` is fp32 or bf16. Adapters of a checkpoint, and those of a directory of peft that
    `adapter` names, are merged into the weights. Raises InferenceError for another precision and
    for a directory that is neither or has no fitting tokenizer, CheckpointError and ConversionError
    for damaged ones, ConfigError if the processes cannot split the model.
    """
    if choices := choice_misfit(Precision, precision):
        raise InferenceError(f"precision is {precision!r}; {choices}")
    path = Path(path)
    if not path.is_dir():
        raise InferenceError(f"{path} is not a directory; name a checkpoint or an HF export")
    tensor_parallel = _tensor_parallel_size(tensor_parallel)
    groups = setup.initialize(ParallelConfig(tensor=tensor_parallel))
    exported = _is_hf_export(path)
    if not exported:  # one for all processes: a run may save its next checkpoint meanwhile
        path = from_rank_0(partial(directories.resolve, path))
    config = _hf_run_config(path) if exported else directories.read_config(path)
    if not config.data.tokenizer:
        raise InferenceError(f"{path} has no tokenizer.model; put the model's own there")
    try:
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.decoder.vocab_size)
    except ConfigError as error:
        raise InferenceError(f"{path}: {error}") from None
    config.parallel = ParallelConfig(tensor=tensor_parallel)
    if exported:  # padded here, and not when a checkpoint was made
        decoder = config.model.decoder
        decoder.vocab_multiple = math.lcm(decoder.vocab_multiple, config.parallel.tensor)
    merged = _merged_weights(path, exported, config, adapter)
    config.kernels, config.stage.lora = KernelConfig(), LoraConfig()
    config.train.precision = precision
    validate_parallel(config, config.parallel.tensor)
    context = ParallelContext(config, groups, device=setup.device())
    (model,) = build(context, config.model, initialize=False)
    if merged is not None:
        with torch.no_grad():
            for name, tensor in weights(model).items():
                tensor.copy_(shard(merged[name].read(), tensor, context))
    elif exported:
        load_hf_weights(path, model)
    else:
        save_load.load_weights(path, [model])
    _prepare(model, context)
    return LoadedModel(model.eval(), config.model, tokenizer)


def _tensor_parallel_size(wanted: int | None) -> int:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted is not None and processes % wanted:
        raise ConfigError(
            f"{processes} processes cannot be divided into groups of {wanted} (tensor parallel); "
            f"start a multiple of {wanted}"
        )
    return processes if wanted is None else wanted


def _hf_run_config(path: Path) -> RunConfig:
    config = RunConfig(model=hf_config.read_model(path))
    config.data.tokenizer = str(path / "tokenizer.model")
    return config


def _merged_weights(
    path: Path, exported: bool, config: RunConfig, adapter: str | Path | None
) -> dict[str, LazyTensor] | None:
    """Whole weights, in fp32 where adapters are in them, or None if there are no adapters."""
    wide = torch.float32  # whatever is stored; the model casts
    if adapter is None and not config.stage.lora.targets:
        return None
    if exported:
        return sources.from_released(path, config=config, adapter=adapter).merged(wide).tensors
    source = sources.from_checkpoint(path).merged(wide)
    if adapter is None:
        return source.tensors
    lora, found = adapters.read_adapter(adapter, source.config.model)
    return adapters.merge(source.tensors | found, source.config.model, lora, wide)


def _prepare(module: nn.Module, context: ParallelContext) -> None:
    """Replace all linears below a module, which frees them, and on a CPU its elementwise operations
    by those for inference."""
    for name, child in module.named_children():
        if isinstance(child, ColumnLinear | RowLinear):
            setattr(module, name, InferenceLinear(child, context))
        else:
            _prepare(child, context)
    if setup.on_cpu() and hasattr(module, "elementwise"):
        object.__setattr__(module, "elementwise", InferenceElementwise())


def _is_hf_export(path: Path) -> bool:
    """Whether a directory is to be read as an export, damaged and foreign ones among them."""
    names = ("config.json", "adapter_config.json")
    return not (path / "run.yaml").exists() and any((path / name).exists() for name in names)
