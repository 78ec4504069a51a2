"""Configuration of mPLUG-Owl2, in the keys of the released checkpoint."""

from transformers import PreTrainedConfig

_VISION = {
    "image_size": 448,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "layer_norm_eps": 1e-6,
}
_ABSTRACTOR = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_learnable_queries": 64,
    "layer_norm_eps": 1e-6,
}


class MPLUGOwl2Config(PreTrainedConfig):
    """Sizes of the decoder, and of ViT and abstractor in the two dicts of `visual_config`.

    The defaults are the released 7B model. Raises ValueError for scaled rotary positions, which
    the model does not have.
    """

    model_type = "mplug_owl2"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        tie_word_embeddings=False,
        rope_theta=10000.0,
        rope_scaling=None,
        visual_config=None,
        **kwargs,
    ):
        # `rope_scaling` is no attribute: transformers would turn it and `rope_theta` into keys
        # that the released code cannot read.
        if rope_scaling is not None:
            raise ValueError(f"rope_scaling is {rope_scaling}, but this model has none")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.rope_theta = rope_theta
        given = visual_config or {}
        self.visual_config = {
            "visual_model": _VISION | given.get("visual_model", {}),
            "visual_abstractor": _ABSTRACTOR | given.get("visual_abstractor", {}),
        }
        super().__init__(**kwargs)

    @property
    def tokens_per_image(self) -> int:
        """Rows that an image takes in the text: its queries and an end token."""
        return self.visual_config["visual_abstractor"]["num_learnable_queries"] + 1
