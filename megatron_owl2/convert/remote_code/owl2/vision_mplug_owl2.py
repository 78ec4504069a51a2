"""The ViT and the visual abstractor of mPLUG-Owl2, and the rows that visual tokens take.

`config` has ViT and abstractor in the two dicts of `visual_config`, the decoder's width in
`hidden_size`, and `initializer_range`.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_OUTER_NORM_EPS = 1e-5  # of norm1, normk and norm2 in the released code, whatever its config says


class MPLUGOwl2VisionModel(nn.Module):
    """CLIP's ViT: normalised pixels [n, 3, H, W] to features [n, 1 + patches, h].

    The class token is the first, and the last norm applies to every token. Raises ValueError for
    another image size than the model's, which the position table does not fit.
    """

    def __init__(self, config: PreTrainedConfig, make_layer=None):
        super().__init__()
        vision = config.visual_config["visual_model"]
        size, eps = vision["hidden_size"], vision["layer_norm_eps"]
        self.image_size = vision["image_size"]
        self.embeddings = MPLUGOwl2VisionEmbeddings(vision)
        make_layer = make_layer or MPLUGOwl2VisionLayer
        layers = [make_layer(config) for _ in range(vision["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = nn.LayerNorm(size, eps)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values are {list(pixels.shape)}, but this model takes "
                f"[images, 3, {self.image_size}, {self.image_size}]"
            )
        x = self.embeddings(pixels)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.post_layernorm(x)


class MPLUGOwl2VisionEmbeddings(nn.Module):
    """Patches behind a class token, plus their positions, normed."""

    def __init__(self, vision: dict):
        super().__init__()
        size, patch = vision["hidden_size"], vision["patch_size"]
        tokens = (vision["image_size"] // patch) ** 2 + 1
        self.cls_token = nn.Parameter(torch.empty(1, 1, size))
        self.position_embedding = nn.Parameter(torch.empty(1, tokens, size))
        self.patch_embed = nn.Conv2d(3, size, patch, patch, bias=False)
        self.pre_layernorm = nn.LayerNorm(size, vision["layer_norm_eps"])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(pixels.to(self.cls_token.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1)
        return self.pre_layernorm(x + self.position_embedding)


class MPLUGOwl2VisionLayer(GradientCheckpointingLayer):
    """Pre-norm layer with biases and quick-GELU; [n, tokens, h] to the same."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        vision = config.visual_config["visual_model"]
        size, ffn, eps = (
            vision["hidden_size"],
            vision["intermediate_size"],
            vision["layer_norm_eps"],
        )
        self.input_layernorm = nn.LayerNorm(size, eps)
        self.self_attn = MPLUGOwl2VisionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(size, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(size, ffn), "fc2": nn.Linear(ffn, size)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        hidden = self.mlp["fc1"](self.post_attention_layernorm(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))


class MPLUGOwl2VisionAttention(nn.Module):
    """Full attention; the rows of query_key_value are grouped by head: its query, key, value."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        vision = config.visual_config["visual_model"]
        size = vision["hidden_size"]
        self.config, self.head_dim = config, size // vision["num_attention_heads"]
        self.query_key_value = nn.Linear(size, 3 * size)
        self.dense = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.query_key_value(x).unflatten(-1, (-1, 3, self.head_dim)).transpose(1, 2)
        return self.dense(attend(self, *qkv.unbind(3)))


class MPLUGOwl2VisualAbstractor(nn.Module):
    """Learnable queries read the features of the ViT (paper, eq. 2).

    [n, 1 + patches, h] to visual tokens [n, queries + 1, decoder width], vit_eos last.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        abstractor, vision = (
            config.visual_config[name] for name in ("visual_abstractor", "visual_model")
        )
        size, queries = abstractor["hidden_size"], abstractor["num_learnable_queries"]
        self.grid = vision["image_size"] // vision["patch_size"]
        self.query_embeds = nn.Parameter(torch.empty(1, queries, size))
        self.vit_eos = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        layers = [MPLUGOwl2AbstractorLayer(config) for _ in range(abstractor["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.visual_fc = nn.Linear(size, config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        queries = self.query_embeds.expand(len(features), -1, -1)
        positions = position_table(queries.shape[1], self.grid, queries.shape[2]).to(features)
        for layer in self.encoder["layers"]:
            queries = layer(queries, features, positions)
        end = self.vit_eos.expand(len(features), -1, -1)
        return torch.cat([self.visual_fc(queries), end], dim=1)


class MPLUGOwl2AbstractorLayer(GradientCheckpointingLayer):
    """Queries [n, q, h], features [n, t, h] and positions [q + t, h] or none to queries."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.crossattention = MPLUGOwl2CrossAttention(config)

    def forward(self, queries, features, positions=None):
        return self.crossattention(queries, features, positions)


class MPLUGOwl2CrossAttention(nn.Module):
    """Attention of the queries over themselves and the image, then a gated MLP.

    The residual of the attention starts from the normed queries; positions are added to queries
    and keys after the norms, never to values (official behaviour, not visible in the paper).
    """

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        abstractor = config.visual_config["visual_abstractor"]
        size, ffn = abstractor["hidden_size"], abstractor["intermediate_size"]
        self.config, self.head_dim = config, size // abstractor["num_attention_heads"]
        self.dropout = abstractor.get("attention_probs_dropout_prob", 0.0)
        self.norm1 = nn.LayerNorm(size, _OUTER_NORM_EPS)
        self.normk = nn.LayerNorm(size, _OUTER_NORM_EPS)
        projections = ("query", "key", "value")
        self.attention = nn.ModuleDict({name: nn.Linear(size, size) for name in projections})
        mlp = {
            "w1": nn.Linear(size, ffn),
            "w3": nn.Linear(size, ffn),
            "ffn_ln": nn.LayerNorm(ffn, abstractor["layer_norm_eps"]),
            "w2": nn.Linear(ffn, size),
        }
        self.output = nn.ModuleDict(
            {
                "out_proj": nn.Linear(size, size),
                "norm2": nn.LayerNorm(size, _OUTER_NORM_EPS),
                "mlp": nn.ModuleDict(mlp),
            }
        )

    def forward(self, queries, features, positions):
        normed = self.norm1(queries)
        context = torch.cat([normed, self.normk(features)], dim=1)  # queries first, then the image
        inputs = {"query": normed, "key": context, "value": context}
        if positions is not None:
            inputs["query"] = normed + positions[: normed.shape[1]]
            inputs["key"] = context + positions
        heads = (
            self.attention[name](x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name, x in inputs.items()
        )
        output, mlp = self.output, self.output["mlp"]
        dropout = self.dropout if self.training else 0.0
        x = normed + output["out_proj"](attend(self, *heads, dropout=dropout))
        normed = output["norm2"](x)
        return x + mlp["w2"](mlp["ffn_ln"](F.silu(mlp["w1"](normed)) * mlp["w3"](normed)))


def attend(module, query, key, value, dropout: float = 0.0) -> torch.Tensor:
    """Full attention [n, heads, q, d] over [n, heads, k, d] by the configured implementation,
    [n, q, heads * d]; `dropout` is that of the probabilities."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention
    )
    scaling = module.head_dim**-0.5
    out, _ = function(module, query, key, value, None, scaling=scaling, dropout=dropout)
    return out.flatten(2)


def eager_attention(
    module, query, key, value, attention_mask, scaling, dropout: float = 0.0, **kwargs
):
    """Attention in plain torch, softmax in float32; output [b, q, heads, d] and weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2), weights


def position_table(queries: int, grid: int, size: int) -> torch.Tensor:
    """Positions of the queries, then of the ViT's tokens, fp32 [queries + 1 + grid^2, size].

    Zeros for the class token; a patch has its column in the first half, its row in the second.
    """
    axis = _sincos(grid, size // 2)
    columns, rows = axis.expand(grid, -1, -1), axis.unsqueeze(1).expand(-1, grid, -1)
    patches = torch.cat([columns, rows], dim=2).flatten(0, 1)
    return torch.cat([_sincos(queries, size), torch.zeros(1, size, device="cpu"), patches])


def _sincos(count: int, size: int) -> torch.Tensor:
    """[sin(p w_j) | cos(p w_j)] of p < count, w_j = 10000^(-j / (size/2)); fp32 [count, size].

    As in the released code every step is rounded to fp32, each once, from fp64.
    """
    exponents = torch.arange(size // 2, dtype=torch.float32, device="cpu") / (size / 2)
    frequencies = 1 / (10000.0 ** exponents.double()).float()
    angles = torch.arange(count, dtype=torch.float32, device="cpu").outer(frequencies).double()
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class MPLUGOwl2GenerationMixin(GenerationMixin):
    """Generation in which every row of a batch keeps its images, and none is read twice.

    `modality`, int64 [b, s], is 0 at text; `visual_inputs` has the keyword of the pixels [n, ...]
    whose visual tokens take the rows of a kind, and that kind. Everything takes
    `config.tokens_per_image` rows.
    """

    visual_inputs = {"pixel_values": 1}

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, inputs_embeds=None, modality=None, **kwargs
    ):
        """Only positions that no cache holds are read, with the images that begin among them."""
        visual = {name: kwargs.pop(name, None) for name in self.visual_inputs}
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if modality is None:
            return inputs | visual
        read = inputs["input_ids"] if inputs["input_ids"] is not None else inputs["inputs_embeds"]
        length = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        first = length - read.shape[1]
        if first >= modality.shape[1]:  # every position is one that was generated
            return inputs
        for name, pixels in visual.items():
            if first > 0 and pixels is not None:
                rows = (modality == self.visual_inputs[name]).nonzero()
                begins = rows[:: self.config.tokens_per_image, 1]
                kept = pixels[(begins >= first).to(pixels.device)]
                visual[name] = kept if len(kept) else None
        modality = F.pad(modality, (0, length - modality.shape[1]))[:, first:]
        return inputs | visual | {"modality": modality}

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
    ):
        """Repeats the images of a row together, as the rows are repeated for beams and samples."""
        visual = {name: kwargs.pop(name, None) for name in self.visual_inputs}
        visual = {name: pixels for name, pixels in visual.items() if pixels is not None}
        modality, size = kwargs.get("modality"), self.config.tokens_per_image
        for name, pixels in visual.items() if expand_size > 1 else ():
            rows = visual_rows(modality, self.visual_inputs[name])
            check_images(rows, pixels, size, name)
            counts = ((modality == self.visual_inputs[name]).sum(1) // size).tolist()
            groups = [g for g in pixels.split(counts) for _ in range(expand_size)]
            visual[name] = torch.cat(groups)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return input_ids, kwargs | visual


def visual_rows(modality: torch.Tensor | None, kind: int) -> torch.Tensor | None:
    """Rows of a kind in the flattened [b * s, h], int64 [n]; None without `modality`."""
    return None if modality is None else (modality.flatten() == kind).nonzero().squeeze(1)


def check_images(
    rows: torch.Tensor | None, pixels: torch.Tensor | None, tokens_per_image: int, name: str
) -> None:
    """Raises ValueError unless every image, or video, of the keyword `name` has its rows and every
    row its image."""
    count = 0 if rows is None else len(rows)
    images = 0 if pixels is None else len(pixels)
    kind = "video" if name.startswith("video") else "image"
    if count != images * tokens_per_image:
        raise ValueError(
            f"modality marks {count} {kind} rows, but {name} hold {images} {kind}s, which take "
            f"{images * tokens_per_image} rows ({tokens_per_image} each)"
        )
