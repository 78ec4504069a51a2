"""Adapters of a checkpoint: merged into its weights, or as a directory of peft and back.

peft has A and B for each linear of the Hugging Face model, which are the targets of `stage.lora`,
under `base_model.model.<module>`; both sides add alpha / r B A (peft/tuners/lora/layer.py).
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_owl2.config import lora
from megatron_owl2.config.schema import LoraConfig, ModelConfig
from megatron_owl2.convert import mapping
from megatron_owl2.convert.json_settings import Settings
from megatron_owl2.convert.layouts import layout_of
from megatron_owl2.convert.lazy_tensor import LazyTensor, finite
from megatron_owl2.convert.peft_models import refuse_without_settings
from megatron_owl2.convert.safetensors_io import (
    ADAPTER_FILES,
    ADAPTER_SETTINGS,
    TensorReader,
    write_safetensors,
)
from megatron_owl2.errors import ConversionError
from megatron_owl2.utils.files import new_directory

_PREFIX = "base_model.model."
# What peft can do otherwise, in its files of all versions; absent is off.
_FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_parameters": None,
}
# What else its files say without changing what an adapter computes: which modules have one (which
# the tensors tell too), how it was started, and how peft keeps it. A setting that is not known here
# is refused where it is switched on, since peft gets new kinds of adapters with every version.
_OTHER = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "runtime_config",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "velora_config", "ensure_weight_tying",
}  # fmt: skip
_KNOWN = _FIXED.keys() | _OTHER
# Of a peft model: which of its wrappers. Version 1's trainer took the plain one.
_TASK_TYPES = {"owl2": "CAUSAL_LM", "owl1": None}
# Of the ways to start an adapter, those that leave the model's own weights as they are.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class _Linear:
    """A target as both sides know it: piece number `index` of the weight of `rule`, and the
    modules of the Hugging Face model, of which more than one have the same weight where the
    modalities share it."""

    target: str
    rule: mapping.Rule
    index: int
    modules: tuple[str, ...]


def _linears(model: ModelConfig, layout: str) -> Iterator[_Linear]:
    """All linears that can have an adapter, with the names of a layout."""
    rules = {rule.ours: rule for rule in mapping.rules(layout, model)}
    shared = mapping.shared_branches(layout, model)
    seen = Counter()
    for target in lora.target_names(model.decoder):
        weight = lora.linear_weight(target)
        rule, index = rules[weight], seen[weight]
        seen[weight] += 1
        names = [rule.theirs[index]]
        names += [name for name, same in shared.items() if same == names[0]]
        yield _Linear(target, rule, index, tuple(n.removesuffix(".weight") for n in names))


def merge(
    tensors: dict[str, LazyTensor],
    model: ModelConfig,
    adapters: LoraConfig,
    dtype: torch.dtype | None = None,
) -> dict[str, LazyTensor]:
    """The weights with the adapters in them: W + alpha / r B A, computed in fp32.

    `dtype` is that of the sums, by default the dtype of W.
    """
    by_weight: dict[str, list[_Linear]] = {}
    for linear in _linears(model, "llama"):  # every decoder's weights are cut alike
        if lora.selects(adapters, linear.target):
            by_weight.setdefault(linear.rule.ours, []).append(linear)

    def merged(weight: str, linears: list[_Linear]) -> LazyTensor:
        kind = dtype or tensors[weight].dtype

        def read() -> torch.Tensor:
            transform = linears[0].rule.transform
            pieces = transform.split(tensors[weight].read().float())
            for linear in linears:
                a, b = (tensors[name].read().float() for name in lora.parameters(linear.target))
                piece = pieces[linear.index]
                pieces[linear.index] = piece + adapters.alpha / adapters.rank * (b @ a)
            return transform.join(pieces).to(kind)

        return LazyTensor(tensors[weight].shape, kind, read)

    plain = {name: tensor for name, tensor in tensors.items() if not lora.is_adapter(name)}
    return plain | {weight: merged(weight, linears) for weight, linears in by_weight.items()}


def export_adapter(
    tensors: dict[str, LazyTensor],
    model: ModelConfig,
    adapters: LoraConfig,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """The adapters alone as a directory of peft, for the exported model without them.

    `dtype` is by default their own. `output` appears when complete. Raises ConversionError if it
    exists, if there is no room, if there is no adapter, if no layout holds the model, or if a
    weight is not finite in `dtype`.
    """
    if not lora.selected(adapters, model.decoder):
        raise ConversionError("the checkpoint has no adapters (stage.lora.targets of its run.yaml)")
    found, modules, layout = {}, [], layout_of(model)
    for linear in _linears(model, layout):
        if lora.selects(adapters, linear.target):
            modules += linear.modules
            for ending, name in zip("AB", lora.parameters(linear.target), strict=True):
                for module in linear.modules:
                    theirs = _name(module, ending)
                    found[theirs] = _cast(theirs, tensors[name], dtype)
    settings = _FIXED | {
        "task_type": _TASK_TYPES[layout],
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "target_modules": modules,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    try:
        with new_directory(Path(output), sum(t.nbytes for t in found.values())) as partial:
            write_safetensors(partial / "adapter_model.safetensors", found)
            (partial / ADAPTER_SETTINGS).write_text(json.dumps(settings, indent=2))
    except OSError as error:
        raise ConversionError(f"{output} cannot be written: {error}") from None


def read_adapter(
    directory: str | Path, model: ModelConfig
) -> tuple[LoraConfig, dict[str, LazyTensor]]:
    """The `stage.lora` of a directory of peft, and its tensors under our names.

    Which linears have an adapter follows from the tensors. Raises ConversionError for a directory
    that is none, for what our adapters cannot do (other sums, ranks of their own), for a setting
    of a later peft, and for tensors that are missing, misshapen, not numbers, or of linears that
    cannot have an adapter here.
    """
    refuse_without_settings(directory)
    settings = Settings.read(Path(directory) / ADAPTER_SETTINGS)
    settings.hold(_FIXED)
    settings.hold({key: None for key, on in settings.tree.items() if on and key not in _KNOWN})
    start = settings.tree.get("init_lora_weights", True)
    if start not in _STARTS:
        raise ConversionError(
            f"{settings.file}: init_lora_weights is {start!r}, which changes the weights of the "
            "model too; merge the adapter with peft, and convert the merged model"
        )
    fields = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    adapters = settings.filled({"lora_dropout": 0.0}).pick(LoraConfig, fields)
    return adapt(adapters, TensorReader(directory, ADAPTER_FILES), model)


def adapt(
    adapters: LoraConfig, reader: TensorReader, model: ModelConfig
) -> tuple[LoraConfig, dict[str, LazyTensor]]:
    """The `stage.lora` of adapters, with the targets that `reader` has tensors of, and these under
    our names; raises ConversionError for those that do not fit the model."""
    linears = [
        linear
        for linear in _linears(model, layout_of(model))
        if any(_name(m, ending) in reader.names() for m in linear.modules for ending in "AB")
    ]
    _check(reader, model, adapters, linears)
    adapters.targets = _patterns([linear.target for linear in linears], model)
    found = {}
    for linear in linears:
        for ending, name in zip("AB", lora.parameters(linear.target), strict=True):
            found[name] = _lazy(reader, _name(linear.modules[0], ending))
    return adapters, found


def _check(
    reader: TensorReader, model: ModelConfig, adapters: LoraConfig, linears: list[_Linear]
) -> None:
    """Hold names, shapes and dtypes against the model."""
    wanted = {}
    for linear in linears:
        outputs, inputs = _shape(linear, model)
        shapes = {"A": (adapters.rank, inputs), "B": (outputs, adapters.rank)}
        wanted |= {_name(m, end): shape for m in linear.modules for end, shape in shapes.items()}
    found = reader.names()
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - found)]
    problems += [
        f"unexpected: {name}; adapters can be on queries, keys, values, output, gate, up and down"
        for name in sorted(found - wanted.keys())
    ]
    for name in sorted(wanted.keys() & found):
        shape, dtype = reader.shape(name), reader.dtype(name)
        if shape != wanted[name]:
            problems.append(f"shape: {name} is {shape}, wanted {wanted[name]}")
        if not isinstance(dtype, torch.dtype):
            problems.append(f"dtype: {name} holds {dtype}, wanted floating-point numbers")
    if not problems:
        problems = [
            f"different: {_name(module, end)} and {_name(linear.modules[0], end)}, which "
            "model.decoder.modality_split has as one"
            for linear in linears
            for module in linear.modules[1:]
            for end in "AB"
            if not torch.equal(reader[_name(module, end)], reader[_name(linear.modules[0], end)])
        ]
    if not found:
        problems.append("it holds no tensors")
    if problems:
        listing = "\n  ".join(problems)
        raise ConversionError(
            f"the adapter {reader.directory} does not fit the model:\n  {listing}"
        )


def _shape(linear: _Linear, model: ModelConfig) -> tuple[int, int]:
    """Outputs and inputs of a target."""
    decoder, kind = model.decoder, linear.target.rpartition(".")[2]
    size = decoder.hidden_size
    kv = size // decoder.num_heads * decoder.num_kv_heads
    return {
        "query": (size, size),
        "output": (size, size),
        "gate": (decoder.ffn_size, size),
        "up": (decoder.ffn_size, size),
        "down": (size, decoder.ffn_size),
    }.get(kind, (kv, size))


def _patterns(targets: list[str], model: ModelConfig) -> list[str]:
    """Patterns that select just these targets: one for a kind that every layer has."""
    kinds = Counter(target.split(".", 3)[3] for target in targets)
    everywhere = {kind for kind, count in kinds.items() if count == model.decoder.num_layers}
    single = [target for target in targets if target.split(".", 3)[3] not in everywhere]
    return [f"*.{kind}" for kind in kinds if kind in everywhere] + single


def _name(module: str, ending: str) -> str:
    return f"{_PREFIX}{module}.lora_{ending}.weight"


def _cast(name: str, tensor: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    kind = dtype or tensor.dtype
    return LazyTensor(tensor.shape, kind, lambda: finite(name, tensor.read().cpu(), kind))


def _lazy(reader: TensorReader, name: str) -> LazyTensor:
    dtype = reader.dtype(name)
    assert isinstance(dtype, torch.dtype), "others were refused"
    return LazyTensor(reader.shape(name), dtype, lambda: reader[name])
