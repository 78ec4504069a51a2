"""Floating-point operations of training, by the mathematics of the model.

A multiplication and an addition are two operations. Matrix products and attention count; norms,
activations and lookups do not. Neither does what only an implementation does: recomputation,
padding, dummy images, text keys and values of vision tokens.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass

from megatron_owl2.config.lora import parameters, selected
from megatron_owl2.config.schema import LoraConfig, ModelConfig
from megatron_owl2.model.parts import FLOPS_GROUPS, STACKS, part_of


@dataclass(frozen=True)
class Load:
    """Content of some samples, without padding.

    `targets`: tokens that the loss asks the output layer for. `pairs`: queries and the keys each of
    them sees in the decoder, n (n + 1) / 2 for n tokens.
    """

    images: int
    tokens: int  # of text and of vision
    vision_tokens: int
    targets: int
    pairs: int


@dataclass(frozen=True)
class _Product:
    """`rows` vectors times one weight of `numel` numbers."""

    weight: str  # its name in the model
    numel: int
    rows: int

    @property
    def group(self) -> str:
        """One of FLOPS_GROUPS."""
        return part_of(self.weight).flops_group


def training_flops(
    model: ModelConfig, load: Load, trained: Set[str], lora: LoraConfig | None = None
) -> dict[str, float]:
    """Operations of a forward and a backward pass over `load`, by FLOPS_GROUPS.

    `trained` holds the names of the parameters that train, `lora` is `stage.lora`. A frozen weight
    has no gradient of its own, and what lies before the first trained part has no backward pass at
    all.
    """
    found = dict.fromkeys(FLOPS_GROUPS, 0.0)
    backward = _groups_with_backward(trained)
    for product in _products(model, load, lora):
        passes = 1 + (product.group in backward) + (product.weight in trained)
        if product.weight == "vision_model.patch_embed.weight":  # pixels need no gradient
            passes -= product.group in backward
        found[product.group] += 2.0 * product.numel * product.rows * passes
    for group, pairs, width in _attention(model, load):
        # Scores and mixed values; each has two products in the backward pass.
        found[group] += 4.0 * pairs * width * (3 if group in backward else 1)
    return found


def _groups_with_backward(trained: Set[str]) -> set[str]:
    """FLOPS_GROUPS with something trained in them or before them."""
    groups = {part_of(name).flops_group for name in trained}
    first = next((n for n, group in enumerate(FLOPS_GROUPS) if group in groups), len(FLOPS_GROUPS))
    return set(FLOPS_GROUPS[first:])


def _products(model: ModelConfig, load: Load, lora: LoraConfig | None) -> Iterator[_Product]:
    vision, abstractor, decoder = model.vision, model.abstractor, model.decoder
    patches = load.images * vision.grid_size**2
    seen = patches + load.images  # the class token of every image
    h, ffn = vision.hidden_size, vision.ffn_size
    numel = 3 * vision.patch_size**2 * h
    yield _Product("vision_model.patch_embed.weight", numel, patches)
    sizes = {"linear_qkv": 3 * h * h, "linear_proj": h * h} | dict.fromkeys(
        ("linear_fc1", "linear_fc2"), h * ffn
    )
    for layer in range(vision.num_layers):
        for name, numel in sizes.items():
            yield _Product(f"vision_model.layers.{layer}.{name}.weight", numel, seen)

    queries = load.images * abstractor.num_queries
    rows = dict.fromkeys(("query", "out_proj", "w1", "w2", "w3"), queries)
    rows |= dict.fromkeys(("key", "value"), queries + seen)
    for layer in range(abstractor.num_layers):
        for name, count in rows.items():
            numel = h * abstractor.ffn_size if name.startswith("w") else h * h
            yield _Product(f"abstractor.layers.{layer}.{name}.weight", numel, count)
    width = decoder.hidden_size
    yield _Product("abstractor.visual_fc.weight", h * width, queries)

    kv = 2 * width * (width // decoder.num_heads) * decoder.num_kv_heads
    split = "key_value" in decoder.modality_split
    own = load.tokens - load.vision_tokens if split else load.tokens
    for layer in range(decoder.num_layers):
        prefix = f"decoder.layers.{layer}"
        qkv = f"{prefix}.attention.qkv.linear_qkv.weight"
        yield _Product(qkv, width * width, load.tokens)
        yield _Product(qkv, kv, own)
        if split:
            name = f"{prefix}.attention.qkv.linear_kv_vision.weight"
            yield _Product(name, kv, load.vision_tokens)
        for name, numel in (
            ("attention.linear_proj", width * width),
            ("mlp.linear_fc1", 2 * width * decoder.ffn_size),
            ("mlp.linear_fc2", width * decoder.ffn_size),
        ):
            yield _Product(f"{prefix}.{name}.weight", numel, load.tokens)
    if lora is not None:
        yield from _adapter_products(model, load, lora)
    yield _Product("output_layer.weight", width * decoder.padded_vocab_size, load.targets)


def _adapter_products(model: ModelConfig, load: Load, lora: LoraConfig) -> Iterator[_Product]:
    decoder = model.decoder
    width, ffn = decoder.hidden_size, decoder.ffn_size
    kv = width // decoder.num_heads * decoder.num_kv_heads
    sizes = {"gate": (width, ffn), "up": (width, ffn), "down": (ffn, width)}
    sizes |= {"query": (width, width), "output": (width, width)}
    split = "key_value" in decoder.modality_split
    rows = {"vision": load.vision_tokens}
    rows["text"] = load.tokens - load.vision_tokens if split else load.tokens
    for target in selected(lora, decoder):
        kind = target.rpartition(".")[2]
        count = rows.get(kind.rpartition("_")[2], load.tokens)
        for name, size in zip(parameters(target), sizes.get(kind, (width, kv)), strict=True):
            yield _Product(name, lora.rank * size, count)


def _attention(model: ModelConfig, load: Load) -> Iterator[tuple[str, int, int]]:
    """One of FLOPS_GROUPS, pairs of query and key over all its layers, width of all heads."""
    vision, abstractor, decoder = model.vision, model.abstractor, model.decoder
    seen = vision.grid_size**2 + 1
    queries = abstractor.num_queries
    yield (
        STACKS["vision_model"].flops_group,
        load.images * seen * seen * vision.num_layers,
        vision.hidden_size,
    )
    pairs = load.images * queries * (queries + seen) * abstractor.num_layers
    yield STACKS["abstractor"].flops_group, pairs, vision.hidden_size
    yield STACKS["decoder"].flops_group, load.pairs * decoder.num_layers, decoder.hidden_size


def forward_again(
    model: ModelConfig,
    load: Load,
    trained: Set[str],
    recompute: str,
    lora: LoraConfig | None = None,
) -> dict[str, float]:
    """Operations that recomputation adds to `training_flops`, by FLOPS_GROUPS.

    `recompute` is `parallel.recompute`: "full" runs the layers' forward pass once more, "selective"
    their attention; only where there is a backward pass.
    """
    again = dict.fromkeys(FLOPS_GROUPS, 0.0)
    backward = _groups_with_backward(trained)
    if recompute == "none":
        return again
    for group, pairs, width in _attention(model, load):
        again[group] += 4.0 * pairs * width * (group in backward)
    if recompute == "full":
        for product in _products(model, load, lora):
            if ".layers." in product.weight and product.group in backward:
                again[product.group] += 2.0 * product.numel * product.rows
    return again
