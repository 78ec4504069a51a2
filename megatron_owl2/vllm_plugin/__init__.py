"""Plugin of vLLM that serves exported directories; an entry point of `vllm.general_plugins`.

vLLM calls `register` in its API server, its engine and every worker. Nothing of this package but
the modules that an export carries is imported, so neither megatron-core nor remote code is needed.
"""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

ARCHITECTURE = "MPLUGOwl2LlamaForCausalLM"
MODE = "owl2"  # of tokenizer and renderer


def register() -> None:
    """Registration of configuration, model, tokenizer and renderer; a second call changes nothing.

    Models are registered by name, since vLLM imports torch layers in its workers only.
    """
    from transformers import AutoConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from megatron_owl2.convert.remote_code.owl2.configuration_mplug_owl2 import MPLUGOwl2Config

    AutoConfig.register(MPLUGOwl2Config.model_type, MPLUGOwl2Config, exist_ok=True)
    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:Owl2ForCausalLM")
    TokenizerRegistry.register(MODE, f"{__name__}.tokenizer", "Owl2Tokenizer")
    RENDERER_REGISTRY.register(MODE, "vllm.renderers.hf", "HfRenderer")
    MODELS_CONFIG_MAP[ARCHITECTURE] = _ModelConfig


class _ModelConfig:
    """Changes of vLLM's configuration for this architecture (its VerifyAndUpdateConfig)."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        """The plugin's tokenizer, unless the user names another."""
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = MODE

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """Nothing."""
