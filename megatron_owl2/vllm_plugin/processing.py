"""Images of a request to pixels, and their rows to places in the prompt."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from functools import cached_property

from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from megatron_owl2.convert.remote_code.owl2.configuration_mplug_owl2 import MPLUGOwl2Config
from megatron_owl2.convert.remote_code.owl2.image_processing_mplug_owl2 import (
    MPLUGOwl2ImageProcessor,
)
from megatron_owl2.convert.remote_code.owl2.prompt_mplug_owl2 import IMAGE


class Owl2ProcessingInfo(BaseProcessingInfo):
    """Sizes of the model, and its image processor."""

    def get_hf_config(self) -> MPLUGOwl2Config:
        return self.ctx.get_hf_config()

    @cached_property
    def image_processor(self) -> MPLUGOwl2ImageProcessor:
        config = self.ctx.model_config
        return MPLUGOwl2ImageProcessor.from_pretrained(
            config.model, revision=config.revision or "main"
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {"image": self.get_hf_config().tokens_per_image}


class Owl2DummyInputsBuilder(BaseDummyInputsBuilder[Owl2ProcessingInfo]):
    """Inputs with which vLLM measures memory: images of the model's own size."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options):
        size = self.info.get_hf_config().visual_config["visual_model"]["image_size"]
        images = self._get_dummy_images(
            width=size,
            height=size,
            num_images=mm_counts.get("image", 0),
            overrides=mm_options.get("image"),
        )
        return {"image": images}


class Owl2MultiModalProcessor(BaseMultiModalProcessor[Owl2ProcessingInfo]):
    """One id for an image to its rows, which have id 0; images to normalised pixels."""

    def apply(self, inputs, timing_ctx) -> MultiModalInput:
        """Raises VLLMValidationError, which answers a request with status 400, if places and
        images differ in number."""
        places = inputs.prompt.count(self.info.get_hf_config().vocab_size)
        images = inputs.mm_data_items.get_all_counts().get("image", 0)
        if places != images:
            raise VLLMValidationError(
                f"the prompt has {places} placeholders {IMAGE}, but there are {images} images; "
                "write one placeholder for each image",
                parameter="image",
            )
        return super().apply(inputs, timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping, hf_kwargs: Mapping) -> BatchFeature:
        return self.info.image_processor(hf_data["images"])

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping):
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping, out_mm_kwargs
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()
        rows = [0] * config.tokens_per_image
        return [PromptReplacement("image", target=[config.vocab_size], replacement=rows)]
