"""Names of an export's weights in vLLM's modules, as the keywords of vLLM's WeightsMapper.

Weights of text have the names that they have in vLLM's LLaMA, those of images stand beside them.
"""

from typing import Any

WEIGHT_NAMES: dict[str, dict[str, Any]] = {
    "orig_to_new_substr": {
        "rotary_emb.inv_freq": None,  # constants that the released code stores
        ".q_pos_embed": None,
        ".k_pos_embed": None,
        "layernorm.multiway.0.weight": "layernorm.weight",
        "layernorm.multiway.1.weight": "layernorm.vision",
    },
    "orig_to_new_stacked": {
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj.multiway.0": (".qkv_proj", "k"),
        ".v_proj.multiway.0": (".qkv_proj", "v"),
        ".k_proj.multiway.1": (".kv_vision", "k"),
        ".v_proj.multiway.1": (".kv_vision", "v"),
        ".gate_proj": (".gate_up_proj", 0),
        ".up_proj": (".gate_up_proj", 1),
    },
    "orig_to_new_prefix": {
        "model.vision_model.": "vision_model.",
        "model.visual_abstractor.": "visual_abstractor.",
    },
}
