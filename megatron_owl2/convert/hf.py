"""Owl2's weights from and to Hugging Face directories, one tensor at a time."""

import shutil
from pathlib import Path

import torch
from torch.nn.functional import interpolate
from tqdm import tqdm

from megatron_owl2.config import ModelConfig
from megatron_owl2.convert import hf_config, mapping
from megatron_owl2.convert.partition import share
from megatron_owl2.convert.weights import ConversionError, TensorReader, write_shards
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training.checkpoint import global_shapes

_POSITIONS = "vision_model.position_embedding"
_GIB = 1024**3


def read_hf_config(directory: str | Path) -> ModelConfig:
    """The ModelConfig of a directory in the released layout; raises ConversionError."""
    return hf_config.read_owl2(directory)


def load_hf_weights(
    directory: str | Path,
    model: Owl2,
    layout: str = "owl2",
    *,
    stored_grid: int | None = None,
    progress: bool = False,
) -> None:
    """Fill the parameters that `layout` covers, cast to the model's dtype; any TP or PP size.

    With "llama" both branches of every modality-adaptive layer start from the LLaMA's one (paper,
    section 4.1). `stored_grid`, patches on a side, resizes the ViT's position table from that
    grid. Raises ConversionError listing every missing, unexpected or misshapen tensor and every
    one that does not hold floating-point numbers; the model is untouched then.
    """
    reader = TensorReader(directory)
    if layout == "clip" and "embeddings.class_embedding" in reader.names():
        reader.add_prefix("vision_model.")  # transformers 5 saves a CLIPVisionModel without it
    table = mapping.rules(layout, model.model)
    _check(reader, layout, table, model, stored_grid)
    parameters = dict(model.named_parameters())
    local = [rule for rule in table if rule.ours in parameters]
    with torch.no_grad():
        for rule in tqdm(local, desc=f"reading {layout}", unit="tensor", disable=not progress):
            tensor = rule.transform.join([reader[name] for name in rule.theirs])
            if rule.ours == _POSITIONS and stored_grid is not None:
                tensor = resize_positions(tensor, model.model.vision.grid_size)
            parameter = parameters[rule.ours]
            parameter.copy_(share(tensor, parameter, model.layout))


def export_hf(
    model: Owl2,
    tokenizer: str | Path | None,
    output: str | Path,
    *,
    layout: str = "owl2",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 * _GIB,
    progress: bool = False,
) -> None:
    """Write a whole model (no tensor or pipeline parallelism) as a Hugging Face directory, with
    the SentencePiece model `tokenizer` if there is one.

    "llama" writes the text branches of the decoder as a LlamaForCausalLM, "clip" the ViT as a
    CLIPVisionModel. `output` appears when complete. Raises ConversionError if it exists, if there
    is no room, or if a weight is not finite in `dtype`.
    """
    output = Path(output)
    if output.exists():
        raise ConversionError(f"{output} exists already; name a new directory or remove it")
    table = [rule for rule in mapping.rules(layout, model.model) if not rule.import_only]
    parameters = dict(model.named_parameters())
    width = torch.empty((), dtype=dtype).element_size()
    needed = sum(parameters[rule.ours].numel() for rule in table) * width

    def tensors():
        for rule in tqdm(table, desc=f"writing {layout}", unit="tensor", disable=not progress):
            parts = rule.transform.split(parameters[rule.ours].detach().cpu())
            for name, part in zip(rule.theirs, parts, strict=True):
                yield name, _cast(name, part, dtype)
        for name, constant in mapping.constants(layout, model.model).items():
            yield name, constant.clone()  # safetensors refuses tensors that share memory

    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if needed > free:
            sizes = f"needs {needed / _GIB:.1f} GiB, free are {free / _GIB:.1f}"
            raise ConversionError(f"no room for {output}: it {sizes}")
        write_shards(partial, tensors(), max_shard_bytes)
        hf_config.write(partial, layout, model.model, dtype)
        if layout != "clip" and tokenizer is not None:
            hf_config.write_tokenizer(partial, model.model)
            shutil.copyfile(tokenizer, partial / "tokenizer.model")
        partial.rename(output)
    except OSError as error:
        raise ConversionError(f"{output} cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def resize_positions(table: torch.Tensor, grid: int) -> torch.Tensor:
    """A ViT's position table [1, 1 + g^2, h] on another grid, [1, 1 + grid^2, h] in fp32.

    The class token's row is kept; the others are resized bicubically (align_corners False), the
    usual way to take a CLIP to another resolution.
    """
    table = table.float()
    stored = round((table.shape[1] - 1) ** 0.5)
    patches = table[:, 1:].unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
    patches = interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = tensor.to(dtype).contiguous()
    if not cast.isfinite().all():
        reason = "is too large for float16" if tensor.isfinite().all() else "is not finite"
        raise ConversionError(f"{name} holds a value that {reason}; nothing was written")
    return cast


def _check(
    reader: TensorReader,
    layout: str,
    table: list[mapping.Rule],
    model: Owl2,
    stored_grid: int | None,
) -> None:
    """Hold the directory's names, shapes and kinds against what this rank's table asks for."""
    shapes = global_shapes(model)
    if stored_grid is not None and _POSITIONS in shapes:
        shapes[_POSITIONS] = (1, stored_grid**2 + 1, model.model.vision.hidden_size)
    wanted = {}
    for rule in table:
        parts = [None] * len(rule.theirs)
        if rule.ours in shapes:
            parts = rule.transform.split(torch.empty(shapes[rule.ours], device="meta"))
        for name, part in zip(rule.theirs, parts, strict=True):
            wanted[name] = wanted.get(name) or (part is not None and tuple(part.shape))
    found = reader.names()
    problems = [f"missing: {n}" for n in sorted(wanted.keys() - found)]
    problems += [
        f"unexpected: {n}" for n in sorted(found - wanted.keys()) if not mapping.needless(layout, n)
    ]
    for name in sorted(wanted.keys() & found):
        shape, floating = reader.describe(name)
        if wanted[name] and shape != wanted[name]:
            problems.append(f"shape: {name} is {shape}, wanted {wanted[name]}")
        if not floating:
            problems.append(f"dtype: {name} does not hold floating-point numbers")
    if problems:
        listing = "\n  ".join(problems)
        raise ConversionError(f"{reader.directory} does not fit the model:\n  {listing}")
