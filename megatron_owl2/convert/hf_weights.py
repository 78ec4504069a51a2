"""Weights of Owl2 from and to Hugging Face directories, with a tensor or two in memory."""

import shutil
from functools import reduce
from pathlib import Path

import torch

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.convert import hf_config, mapping
from megatron_owl2.convert.layouts import LAYOUTS, check_layout
from megatron_owl2.convert.lazy_tensor import LazyTensor, finite
from megatron_owl2.convert.model_card import CardFacts, write_model_card
from megatron_owl2.convert.partition import shard
from megatron_owl2.convert.remote_files import write_remote_code
from megatron_owl2.convert.safetensors_io import TensorReader, write_shards
from megatron_owl2.data.tokenizer import load_tokenizer
from megatron_owl2.errors import ConfigError, ConversionError, StorageError
from megatron_owl2.model.layer_stack import weights
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.model.position_tables import IMAGE_POSITIONS
from megatron_owl2.model.position_tables import NAMES as TABLES
from megatron_owl2.model.vision import POSITION_EMBEDDING, resize_positions
from megatron_owl2.training.checkpoint.save_load import global_shapes
from megatron_owl2.utils.files import new_directory

_GIB = 1024**3


def read_hf(
    directory: str | Path,
    layout: str,
    model: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    *,
    stored_grid: int | None = None,
) -> dict[str, LazyTensor]:
    """Those of our weights in `shapes` that `layout` covers, whole and in the stored dtype.

    A position table of the abstractor that the directory lacks, has rounded to 16 bits, or has for
    another grid is made.

    With "llama" both branches of every modality-adaptive layer start from the LLaMA's one (paper,
    section 4.1). `stored_grid`, patches on a side, resizes the ViT's position table from that
    grid. Raises ConversionError listing every missing, unexpected or misshapen tensor and every
    one that does not hold floating-point numbers, whether or not `shapes` asks for it.
    """
    reader = TensorReader(directory)
    if layout == "clip" and "embeddings.class_embedding" in reader.names():
        reader.rename(
            {name: f"vision_model.{name}" for name in reader.names()}
        )  # transformers 5 saves a CLIPVisionModel without it
    stored = dict(shapes)
    if stored_grid is not None and POSITION_EMBEDDING in stored:
        stored[POSITION_EMBEDDING] = (1, stored_grid**2 + 1, model.vision.hidden_size)
    resized = {n for n in shapes if stored[n] != shapes[n]}

    def is_made(rule: mapping.Rule) -> bool:
        if not rule.constant or (rule.ours == IMAGE_POSITIONS and resized):
            return rule.constant
        found = reader.names().intersection(rule.theirs)
        rounded = (torch.float16, torch.bfloat16)
        return not found or any(reader.dtype(name) in rounded for name in found)

    def lazy(rule: mapping.Rule) -> LazyTensor:
        def read() -> torch.Tensor:
            tensor = rule.transform.join([reader[name] for name in rule.theirs])
            if rule.ours in resized:
                tensor = resize_positions(tensor, model.vision.grid_size)
            return tensor

        dtypes = [t for t in map(reader.dtype, rule.theirs) if isinstance(t, torch.dtype)]
        dtype = reduce(torch.promote_types, dtypes)  # `_check` has refused all other kinds
        return LazyTensor(shapes[rule.ours], dtype, read)

    rules = mapping.rules(layout, model)
    made = [rule for rule in rules if is_made(rule)]
    kept = [rule for rule in rules if rule not in made]
    _check(reader, layout, model, kept, stored)
    tables = mapping.constants(model) if made else {}
    found = {rule.ours: lazy(rule) for rule in kept if rule.ours in shapes}
    return found | {r.ours: LazyTensor.of(tables[r.ours]) for r in made if r.ours in shapes}


def load_hf_weights(directory: str | Path, model: Owl2) -> None:
    """Loading of a directory in a released layout into a live model of any TP and PP size.

    The weights are cast to the model's dtype. Raises ConversionError as `read_hf` does; the model
    is untouched then.
    """
    layout = hf_config.find_layout(directory)
    tensors = read_hf(directory, layout, model.model, global_shapes([model]))
    with torch.no_grad():
        for name, tensor in weights(model).items():
            tensor.copy_(shard(tensors[name].read(), tensor, model.context))


def export_hf(
    tensors: dict[str, LazyTensor],
    model: ModelConfig,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    layout: str = "owl2",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * _GIB,
    facts: CardFacts | None = None,
    progress: bool = False,
) -> None:
    """Export of whole weights under our names as a Hugging Face directory, with the
    SentencePiece model `tokenizer` if there is one.

    "llama" writes the text branches of the decoder as a LlamaForCausalLM, "clip" the ViT as a
    CLIPVisionModel; layouts of whole models bring their code for transformers and a model card
    with `facts` along.
    `dtype` is by default the weights' own, the wider one if they have several; position tables keep
    theirs. `output` appears when complete. Raises ConversionError if it exists, if there is no
    room, if the layout cannot hold the model, or if a weight is not finite in `dtype`.
    """
    dtypes = (tensor.dtype for name, tensor in tensors.items() if name not in TABLES)
    dtype = dtype or reduce(torch.promote_types, dtypes)
    if layout in LAYOUTS:
        check_layout(layout, model)
    theirs = _theirs(tensors, layout, model, dtype)
    if tokenizer is not None:
        try:
            load_tokenizer(tokenizer, model.decoder.vocab_size)
        except (ConfigError, StorageError) as error:
            raise ConversionError(str(error)) from None
    try:
        with new_directory(Path(output), sum(t.nbytes for t in theirs.values())) as partial:
            write_shards(partial, theirs, max_shard_bytes, progress=progress)
            hf_config.write(partial, layout, model, dtype)
            if layout != "clip" and tokenizer is not None:
                hf_config.write_tokenizer(partial, model)
                shutil.copyfile(tokenizer, partial / "tokenizer.model")
            if layout in LAYOUTS:
                write_remote_code(partial, layout)
                write_model_card(partial, model, facts)
    except OSError as error:
        raise ConversionError(f"{output} cannot be written: {error}") from None


def _theirs(
    tensors: dict[str, LazyTensor], layout: str, model: ModelConfig, dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """The tensors of a directory under their names, cast to `dtype`."""
    current: dict[str, list[torch.Tensor]] = {}  # what the parameter read last is split into

    def lazy(rule: mapping.Rule, index: int, name: str, shape: torch.Size) -> LazyTensor:
        def read() -> torch.Tensor:
            if rule.ours not in current:
                current.clear()
                current[rule.ours] = rule.transform.split(tensors[rule.ours].read().cpu())
            return finite(name, current[rule.ours][index], kind)

        kind = tensors[rule.ours].dtype if rule.constant else dtype
        return LazyTensor(tuple(shape), kind, read)

    theirs = {}
    for rule in mapping.rules(layout, model):
        if not rule.import_only:
            split = rule.transform.split(torch.empty(tensors[rule.ours].shape, device="meta"))
            for i, (name, tensor) in enumerate(zip(rule.theirs, split, strict=True)):
                theirs[name] = lazy(rule, i, name, tensor.shape)
    for name, same in mapping.shared_branches(layout, model).items():
        theirs[name] = theirs[same]
    return theirs


def _check(
    reader: TensorReader,
    layout: str,
    model: ModelConfig,
    rules: list[mapping.Rule],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Check of the directory's names, shapes and dtypes against what the table asks for."""
    wanted = {}  # their shape, or None for what lies on another pipeline stage
    for rule in rules:
        split = [None] * len(rule.theirs)
        if rule.ours in shapes:
            split = rule.transform.split(torch.empty(shapes[rule.ours], device="meta"))
        for name, tensor in zip(rule.theirs, split, strict=True):
            wanted[name] = wanted.get(name) or (None if tensor is None else tuple(tensor.shape))
    shared_branches = mapping.shared_branches(layout, model)
    wanted |= {name: wanted[same] for name, same in shared_branches.items()}
    found = reader.names()
    problems = [f"missing: {n}" for n in sorted(wanted.keys() - found)]
    problems += [
        f"unexpected: {n}"
        for n in sorted(found - wanted.keys())
        if not mapping.ignorable(layout, n)
    ]
    for name in sorted(wanted.keys() & found):
        shape, dtype = reader.shape(name), reader.dtype(name)
        if wanted[name] and shape != wanted[name]:
            problems.append(f"shape: {name} is {shape}, wanted {wanted[name]}")
        if not isinstance(dtype, torch.dtype):
            problems.append(
                f"dtype: {name} holds {dtype}, wanted floating-point numbers of 16, 32 or 64 bit"
            )
    if not problems:
        problems = [
            f"different: {name} and {same}, which model.decoder.modality_split has as one"
            for name, same in shared_branches.items()
            if not torch.equal(reader[name], reader[same])
        ]
        problems += [
            f"different: {name} and {rule.theirs[0]}, which hold one position table"
            for rule in rules
            if rule.constant
            for name in rule.theirs[1:]
            if not torch.equal(reader[name], reader[rule.theirs[0]])
        ]
    if problems:
        listing = "\n  ".join(problems)
        raise ConversionError(f"{reader.directory} does not fit the model:\n  {listing}")
