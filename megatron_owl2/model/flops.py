"""How many floating-point operations training needs by the mathematics of the model.

A multiplication and an addition are two operations. Matrix products and attention count; norms,
activations and lookups do not. Neither does what only an implementation does: recomputation,
padding, dummy images, text keys and values of vision tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_owl2.config.schema import ModelConfig

PARTS = ("ViT", "abstractor", "decoder", "output layer")  # in the order of the forward pass


@dataclass(frozen=True)
class Load:
    """What some samples hold, without padding.

    `pairs`: queries and the keys each of them sees in the decoder, n (n + 1) / 2 for n tokens.
    """

    images: int
    tokens: int  # of text and of vision
    vision_tokens: int
    pairs: int


@dataclass(frozen=True)
class _Product:
    """`rows` vectors times one weight of `numel` numbers."""

    part: str
    weight: str  # its name in the model
    numel: int
    rows: int


def training_flops(model: ModelConfig, load: Load, trained: set[str]) -> dict[str, float]:
    """Operations of a forward and a backward pass over `load`, by PARTS.

    `trained` holds the names of the parameters that train. A frozen weight has no gradient of its
    own, and what lies before the first trained part has no backward pass at all.
    """
    found = dict.fromkeys(PARTS, 0.0)
    backward = _parts_with_backward(trained)
    for product in _products(model, load):
        passes = 1 + (product.part in backward) + (product.weight in trained)
        if product.weight == "vision_model.patch_embed.weight":  # pixels need no gradient
            passes -= product.part in backward
        found[product.part] += 2.0 * product.numel * product.rows * passes
    for part, pairs, width in _attention(model, load):
        # Scores and mixed values; each has two products in the backward pass.
        found[part] += 4.0 * pairs * width * (3 if part in backward else 1)
    return found


def _parts_with_backward(trained: set[str]) -> set[str]:
    """Those with something trained in them or before them."""
    begins = ("vision_model.", "abstractor.", ("embedding.", "decoder."), ("final", "output"))
    first = next((n for n, b in enumerate(begins) if any(w.startswith(b) for w in trained)), 4)
    return set(PARTS[first:])


def _products(model: ModelConfig, load: Load) -> Iterator[_Product]:
    vision, abstractor, decoder = model.vision, model.abstractor, model.decoder
    patches = load.images * vision.grid_size**2
    seen = patches + load.images  # the class token of every image
    h, ffn = vision.hidden_size, vision.ffn_size
    numel = 3 * vision.patch_size**2 * h
    yield _Product("ViT", "vision_model.patch_embed.weight", numel, patches)
    sizes = {"linear_qkv": 3 * h * h, "linear_proj": h * h} | dict.fromkeys(
        ("linear_fc1", "linear_fc2"), h * ffn
    )
    for layer in range(vision.num_layers):
        for name, numel in sizes.items():
            yield _Product("ViT", f"vision_model.layers.{layer}.{name}.weight", numel, seen)

    queries = load.images * abstractor.num_queries
    rows = dict.fromkeys(("query", "out_proj", "w1", "w2", "w3"), queries)
    rows |= dict.fromkeys(("key", "value"), queries + seen)
    for layer in range(abstractor.num_layers):
        for name, count in rows.items():
            numel = h * abstractor.ffn_size if name.startswith("w") else h * h
            yield _Product("abstractor", f"abstractor.layers.{layer}.{name}.weight", numel, count)
    width = decoder.hidden_size
    yield _Product("abstractor", "abstractor.visual_fc.weight", h * width, queries)

    kv = 2 * width * (width // decoder.num_heads) * decoder.num_kv_heads
    split = "key_value" in decoder.modality_split
    own = load.tokens - load.vision_tokens if split else load.tokens
    for layer in range(decoder.num_layers):
        prefix = f"decoder.layers.{layer}"
        qkv = f"{prefix}.attention.qkv.linear_qkv.weight"
        yield _Product("decoder", qkv, width * width, load.tokens)
        yield _Product("decoder", qkv, kv, own)
        if split:
            name = f"{prefix}.attention.qkv.linear_kv_vision.weight"
            yield _Product("decoder", name, kv, load.vision_tokens)
        for name, numel in (
            ("attention.linear_proj", width * width),
            ("mlp.linear_fc1", 2 * width * decoder.ffn_size),
            ("mlp.linear_fc2", width * decoder.ffn_size),
        ):
            yield _Product("decoder", f"{prefix}.{name}.weight", numel, load.tokens)
    yield _Product("output layer", "output_layer.weight", width * decoder.vocab_size, load.tokens)


def _attention(model: ModelConfig, load: Load) -> Iterator[tuple[str, int, int]]:
    """Part, pairs of query and key over all layers, and the width of a token's heads together."""
    vision, abstractor, decoder = model.vision, model.abstractor, model.decoder
    seen = vision.grid_size**2 + 1
    queries = abstractor.num_queries
    yield "ViT", load.images * seen * seen * vision.num_layers, vision.hidden_size
    pairs = load.images * queries * (queries + seen) * abstractor.num_layers
    yield "abstractor", pairs, vision.hidden_size
    yield "decoder", load.pairs * decoder.num_layers, decoder.hidden_size


def forward_again(
    model: ModelConfig, load: Load, trained: set[str], recompute: str
) -> dict[str, float]:
    """Operations that recomputation adds to `training_flops`, by PARTS.

    `recompute` is `parallel.recompute`: "full" runs the layers' forward pass once more, "selective"
    their attention; only where there is a backward pass.
    """
    again = dict.fromkeys(PARTS, 0.0)
    backward = _parts_with_backward(trained)
    if recompute == "none":
        return again
    for part, pairs, width in _attention(model, load):
        again[part] += 4.0 * pairs * width * (part in backward)
    if recompute == "full":
        for product in _products(model, load):
            if ".layers." in product.weight and product.part in backward:
                again[product.part] += 2.0 * product.numel * product.rows
    return again
