"""Configuration of mPLUG-Owl, version 1, in the keys of the released checkpoints."""

from transformers import LlamaConfig, PreTrainedConfig

_VISION = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "layer_norm_eps": 1e-6,
    "temporal": False,
}
_RELEASED_SIZE = 2816  # of the abstractor's MLP, which the video variant takes as it is
_ABSTRACTOR = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "attention_probs_dropout_prob": 0.1,  # the released class has it, and acts in training
    "layer_norm_eps": 1e-6,
}


class MplugOwlConfig(PreTrainedConfig):
    """Sizes of ViT and abstractor, dicts, and of the language model, a LlamaConfig.

    The defaults are those of the released classes. `vision_config["temporal"]` says whether the
    model is the video variant; released configurations do not name it. Raises ValueError for
    another language model than LLaMA, and for an abstractor of another width than the ViT's.
    """

    model_type = "mplug-owl"
    sub_configs = {"text_config": LlamaConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vision_config=None,
        visual_abstractor_config=None,
        text_config=None,
        num_query_tokens=64,
        initializer_range=0.02,
        **kwargs,
    ):
        self.vision_config = _VISION | (vision_config or {})
        self.visual_abstractor_config = _ABSTRACTOR | (visual_abstractor_config or {})
        given = text_config or {}
        if isinstance(given, PreTrainedConfig):
            given = given.to_dict()
        if (kind := given.get("model_type", "llama")) != "llama":
            raise ValueError(f"text_config is of the model_type {kind!r}; this code reads 'llama'")
        self.text_config = LlamaConfig(**given)
        widths = [c["hidden_size"] for c in (self.vision_config, self.visual_abstractor_config)]
        if len(set(widths)) > 1:
            raise ValueError(
                f"visual_abstractor_config.hidden_size is {widths[1]}, but that of vision_config "
                f"{widths[0]}; the abstractor is as wide as the ViT"
            )
        self.num_query_tokens = num_query_tokens
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def tokens_per_image(self) -> int:
        """Rows that an image, or a video, takes in the text: its queries and an end token."""
        return self.num_query_tokens + 1

    @property
    def visual_config(self) -> dict:
        """ViT and abstractor in the keys of version 2."""
        abstractor = dict(self.visual_abstractor_config)
        size = abstractor["intermediate_size"]
        if self.vision_config["temporal"] and size != _RELEASED_SIZE:
            # The released video code has two thirds of it, in whole 256s.
            abstractor["intermediate_size"] = -(-(2 * size // 3) // 256) * 256
        return {"visual_model": self.vision_config, "visual_abstractor": abstractor}
