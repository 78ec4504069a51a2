"""Linears that can have a LoRA adapter: their names, their weights and the names of the adapters.

A linear of a Hugging Face directory is one target here, also where the decoder computes several
of them in one GEMM. The order of targets of one weight is that of its rows (convert/mapping.py).
"""

from fnmatch import fnmatchcase

from megatron_owl2.config.require import require
from megatron_owl2.config.schema import DecoderConfig, LoraConfig, ModelConfig

_LAYER = "decoder.layers."
# Targets of a decoder layer, and the linear that computes each.
_LINEARS = {
    "attention.query": "attention.qkv.linear_qkv",
    "attention.key_text": "attention.qkv.linear_qkv",
    "attention.value_text": "attention.qkv.linear_qkv",
    "attention.key_vision": "attention.qkv.linear_kv_vision",
    "attention.value_vision": "attention.qkv.linear_kv_vision",
    "attention.output": "attention.linear_proj",
    "mlp.gate": "mlp.linear_fc1",
    "mlp.up": "mlp.linear_fc1",
    "mlp.down": "mlp.linear_fc2",
}


def _adapter(target: str) -> str:
    """The module within a layer that adapts a target: beside its linear."""
    return f"{_LINEARS[target].rpartition('.')[0]}.adapters.{target.rpartition('.')[2]}"


_TARGETS = {_adapter(target): target for target in _LINEARS}


def target_names(decoder: DecoderConfig) -> list[str]:
    """All targets of a decoder: decoder.layers.0.attention.query, ..., layer by layer.

    Without key_value in `modality_split`, key_text and value_text serve both modalities.
    """
    split = "key_value" in decoder.modality_split
    kinds = [t for t in _LINEARS if split or not t.endswith("_vision")]
    return [f"{_LAYER}{n}.{kind}" for n in range(decoder.num_layers) for kind in kinds]


def selected(lora: LoraConfig, decoder: DecoderConfig) -> list[str]:
    """The targets that get an adapter, in the order of `target_names`."""
    return [name for name in target_names(decoder) if selects(lora, name)]


def selects(lora: LoraConfig, target: str) -> bool:
    """Whether a target gets an adapter."""
    return any(fnmatchcase(target, pattern) for pattern in lora.targets)


def linear_weight(target: str) -> str:
    """The name of the weight that holds a target."""
    layer, kind = _split(target)
    return f"{layer}{_LINEARS[kind]}.weight"


def parameters(target: str) -> tuple[str, str]:
    """The names of A and B of a target's adapter."""
    layer, kind = _split(target)
    return f"{layer}{_adapter(kind)}.lora_A", f"{layer}{_adapter(kind)}.lora_B"


def is_adapter(parameter: str) -> bool:
    """Whether the parameter of this name is A or B of an adapter."""
    return parameter.endswith((".lora_A", ".lora_B"))


def target_of(parameter: str) -> str:
    """The target that the adapter with this parameter adapts."""
    layer, kind = _split(parameter.rpartition(".")[0])
    return layer + _TARGETS[kind]


def check_lora(lora: LoraConfig, model: ModelConfig) -> None:
    """Refuse patterns that select no linear, and a dropout of everything; raises ConfigError."""
    names = target_names(model.decoder)
    for pattern in lora.targets:
        require(
            any(fnmatchcase(name, pattern) for name in names),
            f"stage.lora.targets: pattern {pattern!r} matches no linear; names look like "
            f"{names[0]}, {names[-1]}",
        )
    require(
        lora.dropout < 1,
        f"stage.lora.dropout ({lora.dropout}) must be below 1, or adapters would see nothing",
    )


def _split(name: str) -> tuple[str, str]:
    """decoder.layers.N. and the rest."""
    number, _, rest = name.removeprefix(_LAYER).partition(".")
    return f"{_LAYER}{number}.", rest
