"""Fields of our configuration and of `config.json`, in all layouts of Hugging Face directories."""

from typing import Any

from megatron_owl2.config.schema import DecoderConfig
from megatron_owl2.convert.json_settings import Settings

# Our field and theirs.
DECODER = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
VISION = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "norm_eps": "layer_norm_eps",
}
ABSTRACTOR = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "norm_eps": "layer_norm_eps",
    "attention_dropout": "attention_probs_dropout_prob",
}
# Settings that the model always has; a directory that says otherwise is another model.
FIXED_DECODER = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
FIXED_VISION = {"hidden_act": "quick_gelu", "num_channels": 3, "attention_dropout": 0.0}
_FIXED_NEWER_DECODER = {"sliding_window": None, "partial_rotary_factor": 1.0}  # not in exports


def read_decoder(settings: Settings) -> DecoderConfig:
    """Sizes of a LLaMA; raises ConversionError for what the decoder cannot have."""
    tree = settings.tree
    if tree.get("rope_parameters") is not None:  # of transformers 5, instead of theta and scaling
        rope = settings.section("rope_parameters").tree
        moved = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            moved["rope_scaling"] = rope
        settings = settings.replaced(moved)
    heads = {"num_key_value_heads": tree.get("num_attention_heads")}
    defaults = heads | {"rope_theta": DecoderConfig.rope_theta}
    decoder = settings.filled(defaults).pick(DecoderConfig, DECODER)
    settings.hold(FIXED_DECODER | _FIXED_NEWER_DECODER)
    if tree.get("head_dim") is not None:
        settings.hold({"head_dim": decoder.hidden_size // decoder.num_heads})
    return decoder


def export(config: Any, fields: dict[str, str]) -> dict[str, Any]:
    """The fields of a section of our configuration under their names."""
    return {theirs: getattr(config, ours) for ours, theirs in fields.items()}
