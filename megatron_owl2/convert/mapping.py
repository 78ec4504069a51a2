"""Table of names: the tensors of a Hugging Face directory that make each parameter of Owl2.

Four layouts: "owl2" is the released mPLUG-Owl2, "owl1" the released mPLUG-Owl (version 1), "llama"
a LlamaForCausalLM (the decoder), "clip" a CLIPVisionModel (the ViT). In a row, `{i}` is a layer,
`{p}` stands for weight and bias, `{text}` and `{vision}` for the branch of a modality-adaptive
module ("owl1" and a LLaMA have one branch for both). Rows of a vision branch say to which part of
`model.decoder.modality_split` they belong.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.convert.transforms import (
    Copy,
    Interleave,
    LeadingOnes,
    PadRows,
    Repeat,
    TrailingOnes,
    Transform,
)
from megatron_owl2.model.position_tables import (
    IMAGE_POSITIONS,
    QUERY_POSITIONS,
    image_positions,
    query_positions,
)


@dataclass(frozen=True)
class Rule:
    """One weight of ours and the Hugging Face tensors it is joined from.

    `import_only`: the tensors belong to another parameter, from which this one is initialised.
    `constant`: a buffer, which a directory may lack and which keeps its dtype.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform
    import_only: bool = False
    constant: bool = False


def _copy(model: ModelConfig) -> Transform:
    return Copy()


def _vocabulary(model: ModelConfig) -> Transform:
    padding = model.decoder.padded_vocab_size - model.decoder.vocab_size
    return PadRows(padding) if padding else Copy()


def _decoder_qkv(model: ModelConfig) -> Transform:
    groups = model.decoder.num_kv_heads
    return Interleave(groups, (model.decoder.num_heads // groups, 1, 1))


def _decoder_kv(model: ModelConfig) -> Transform:
    return Interleave(model.decoder.num_kv_heads, (1, 1))


def _gate_up(model: ModelConfig) -> Transform:
    return Interleave(1, (1, 1))


def _clip_qkv(model: ModelConfig) -> Transform:
    return Interleave(model.vision.num_heads, (1, 1, 1))


def _class_token(model: ModelConfig) -> Transform:
    return LeadingOnes(2)


def _positions(model: ModelConfig) -> Transform:
    return LeadingOnes(1)


@dataclass(frozen=True)
class _Block:
    """Rows (our name, their names, transform; of a vision branch the part that is split) under a
    common prefix on both sides."""

    ours: str
    theirs: str
    layers: Callable[[ModelConfig], int]
    rows: tuple[tuple, ...]


def _once(model: ModelConfig) -> int:
    return 1


def _if_temporal(model: ModelConfig) -> int:
    return int(model.vision.temporal)


def _squeezed(count: int) -> Callable[[ModelConfig], Transform]:
    return lambda model: TrailingOnes(count)


def _under(prefix: str, blocks: tuple[_Block, ...]) -> tuple[_Block, ...]:
    """The same rows with all of their names below `prefix`."""
    return tuple(replace(block, theirs=prefix + block.theirs) for block in blocks)


_DECODER = (
    _Block("", "", _once, (
        ("embedding.weight", "model.embed_tokens.weight", _vocabulary),
        ("final_norm.weight", "model.norm.weight", _copy),
        ("output_layer.weight", "lm_head.weight", _vocabulary),
    )),
    _Block("decoder.layers.{i}.", "model.layers.{i}.", lambda m: m.decoder.num_layers, (
        ("input_norm.weight_text", "input_layernorm{text}.weight", _copy),
        ("input_norm.weight_vision", "input_layernorm{vision}.weight", _copy, "input_norm"),
        (
            "attention.qkv.linear_qkv.weight",
            "self_attn.q_proj.weight self_attn.k_proj{text}.weight self_attn.v_proj{text}.weight",
            _decoder_qkv,
        ),
        (
            "attention.qkv.linear_kv_vision.weight",
            "self_attn.k_proj{vision}.weight self_attn.v_proj{vision}.weight",
            _decoder_kv,
            "key_value",
        ),
        ("attention.linear_proj.weight", "self_attn.o_proj.weight", _copy),
        ("pre_mlp_norm.weight_text", "post_attention_layernorm{text}.weight", _copy),
        (
            "pre_mlp_norm.weight_vision",
            "post_attention_layernorm{vision}.weight",
            _copy,
            "mlp_norm",
        ),
        ("mlp.linear_fc1.weight", "mlp.gate_proj.weight mlp.up_proj.weight", _gate_up),
        ("mlp.linear_fc2.weight", "mlp.down_proj.weight", _copy),
    )),
)  # fmt: skip

_VISION = (
    _Block("vision_model.", "vision_model.", _once, (
        ("cls_token", "embeddings.cls_token", _copy),
        ("position_embedding", "embeddings.position_embedding", _copy),
        ("patch_embed.weight", "embeddings.patch_embed.weight", _copy),
        ("pre_layernorm.{p}", "embeddings.pre_layernorm.{p}", _copy),
        ("post_layernorm.{p}", "post_layernorm.{p}", _copy),
    )),
    _Block(
        "vision_model.layers.{i}.",
        "vision_model.encoder.layers.{i}.",
        lambda m: m.vision.num_layers,
        (
            ("input_layernorm.{p}", "input_layernorm.{p}", _copy),
            ("linear_qkv.{p}", "self_attn.query_key_value.{p}", _copy),
            ("linear_proj.{p}", "self_attn.dense.{p}", _copy),
            ("pre_mlp_layernorm.{p}", "post_attention_layernorm.{p}", _copy),
            ("linear_fc1.{p}", "mlp.fc1.{p}", _copy),
            ("linear_fc2.{p}", "mlp.fc2.{p}", _copy),
        ),
    ),
)  # fmt: skip

_QUERIES = {
    "owl2": (_Block("abstractor.", "", _once, (("query_embeds", "query_embeds", _copy),)),),
    "owl1": (_Block("abstractor.", "", _once, (("query_embeds", "query_tokens", _copy),)),),
}
_ABSTRACTOR = (
    _Block("abstractor.", "", _once, (
        ("vit_eos", "vit_eos", _copy),
        ("visual_fc.{p}", "visual_fc.{p}", _copy),
    )),
    _Block(
        "abstractor.layers.{i}.",
        "encoder.layers.{i}.crossattention.",
        lambda m: m.abstractor.num_layers,
        (
            ("norm1.{p}", "norm1.{p}", _copy),
            ("normk.{p}", "normk.{p}", _copy),
            ("query.{p}", "attention.query.{p}", _copy),
            ("key.{p}", "attention.key.{p}", _copy),
            ("value.{p}", "attention.value.{p}", _copy),
            ("out_proj.{p}", "output.out_proj.{p}", _copy),
            ("norm2.{p}", "output.norm2.{p}", _copy),
            ("w1.{p}", "output.mlp.w1.{p}", _copy),
            ("w3.{p}", "output.mlp.w3.{p}", _copy),
            ("ffn_ln.{p}", "output.mlp.ffn_ln.{p}", _copy),
            ("w2.{p}", "output.mlp.w2.{p}", _copy),
        ),
    ),
)  # fmt: skip

_TEMPORAL = (
    _Block("abstractor.", "", _if_temporal, (
        ("temporal_query_embeds", "temporal_query_tokens", _copy),
        ("temporal_fc.{p}", "abstractor.temporal_visual_fc.{p}", _copy),
    )),
    _Block(
        "vision_model.layers.{i}.temporal.",
        "vision_model.encoder.layers.{i}.temporal.",
        lambda m: _if_temporal(m) * m.vision.num_layers,
        (
            ("norm.{p}", "ln.{p}", _copy),
            ("down.weight", "down_proj.weight", _squeezed(3)),
            ("down.bias", "down_proj.bias", _copy),
            ("conv.weight", "conv.weight", _squeezed(2)),
            ("conv.bias", "conv.bias", _copy),
            ("up.weight", "up_proj.weight", _squeezed(3)),
            ("up.bias", "up_proj.bias", _copy),
        ),
    ),
)  # fmt: skip

_CLIP = (
    _Block("vision_model.", "vision_model.", _once, (
        ("cls_token", "embeddings.class_embedding", _class_token),
        ("position_embedding", "embeddings.position_embedding.weight", _positions),
        ("patch_embed.weight", "embeddings.patch_embedding.weight", _copy),
        ("pre_layernorm.{p}", "pre_layrnorm.{p}", _copy),  # spelt so in every CLIP checkpoint
        ("post_layernorm.{p}", "post_layernorm.{p}", _copy),
    )),
    _Block(
        "vision_model.layers.{i}.",
        "vision_model.encoder.layers.{i}.",
        lambda m: m.vision.num_layers,
        (
            ("input_layernorm.{p}", "layer_norm1.{p}", _copy),
            (
                "linear_qkv.{p}",
                "self_attn.q_proj.{p} self_attn.k_proj.{p} self_attn.v_proj.{p}",
                _clip_qkv,
            ),
            ("linear_proj.{p}", "self_attn.out_proj.{p}", _copy),
            ("pre_mlp_layernorm.{p}", "layer_norm2.{p}", _copy),
            ("linear_fc1.{p}", "mlp.fc1.{p}", _copy),
            ("linear_fc2.{p}", "mlp.fc2.{p}", _copy),
        ),
    ),
)  # fmt: skip

_BLOCKS = {
    "owl2": _DECODER
    + _under("model.", _VISION)
    + _under("model.visual_abstractor.", _QUERIES["owl2"] + _ABSTRACTOR),
    "owl1": _under("language_model.", _DECODER)
    + _VISION
    + _QUERIES["owl1"]
    + _under("abstractor.", _ABSTRACTOR)
    + _TEMPORAL,
    "llama": _DECODER,
    "clip": _CLIP,
}
_BRANCHES = {
    "owl2": {"text": ".multiway.0", "vision": ".multiway.1"},
    "owl1": {"text": "", "vision": ""},
    "llama": {"text": "", "vision": ""},
    "clip": {},
}
_LAYER = "model.visual_abstractor.encoder.layers.{i}.crossattention.attention."
_TABLES = {QUERY_POSITIONS: _LAYER + "q_pos_embed", IMAGE_POSITIONS: _LAYER + "k_pos_embed"}
_IGNORABLE = {  # what the model can compute, or modules of a CLIP that Owl2 does not have
    "owl2": r".*\.(rotary_emb\.inv_freq|[qk]_pos_embed)",
    "owl1": r".*\.rotary_emb\.inv_freq",
    "llama": r".*\.rotary_emb\.inv_freq",
    "clip": r"text_model\..*|(text|visual)_projection\.weight|logit_scale"
    r"|vision_model\.embeddings\.position_ids",
}


def rules(layout: str, model: ModelConfig) -> list[Rule]:
    """The table of a layout for a model's sizes, one Rule per weight of ours it covers."""
    table = [
        Rule(ours, theirs, transform(model), layout == "llama" and part is not None)
        for ours, theirs, transform, part in _rows(layout, model, _BRANCHES[layout])
        if part is None or part in model.decoder.modality_split
    ]
    # The released abstractor of mPLUG-Owl2 has a copy of both tables in every layer.
    if layout == "owl2" and model.abstractor.positions == "sincos":
        layers = model.abstractor.num_layers
        for name, theirs in _TABLES.items():
            names = tuple(theirs.format(i=i) for i in range(layers))
            table.append(Rule(name, names, Repeat(layers), constant=True))
    return table


def shared_branches(layout: str, model: ModelConfig) -> dict[str, str]:
    """Tensors of a vision branch that this model shares with text, and their equals of the text
    branch: written twice, and held equal when read."""
    if layout != "owl2":
        return {}
    text = _BRANCHES[layout]["text"]
    pairs = zip(
        _rows(layout, model, _BRANCHES[layout]),
        _rows(layout, model, {"text": text, "vision": text}),
        strict=True,
    )
    return {
        name: same
        for (_, names, _, part), (_, sames, _, _) in pairs
        if part is not None and part not in model.decoder.modality_split
        for name, same in zip(names, sames, strict=True)
    }


def _rows(layout: str, model: ModelConfig, branches: dict[str, str]) -> Iterator[tuple]:
    """(our name, their names, transform, part of a vision branch or None) of every row."""
    for block in _BLOCKS[layout]:
        for i in range(block.layers(model)):
            for ours, theirs, transform, *part in block.rows:
                for p in ("weight", "bias") if "{p}" in ours else ("",):
                    fields = {"i": i, "p": p, **branches}
                    names = tuple((block.theirs + t).format(**fields) for t in theirs.split())
                    yield (block.ours + ours).format(**fields), names, transform, *(part or [None])


def ignorable(layout: str, name: str) -> bool:
    """Whether a Hugging Face tensor may be in a directory of this layout without being read."""
    return re.fullmatch(_IGNORABLE[layout], name) is not None


def constants(model: ModelConfig) -> dict[str, torch.Tensor]:
    """The abstractor's position tables under our names, fp32, for weights that lack them."""
    size = model.vision.hidden_size
    return {
        QUERY_POSITIONS: query_positions(model.abstractor.num_queries, size),
        IMAGE_POSITIONS: image_positions(model.vision.grid_size, size),
    }
