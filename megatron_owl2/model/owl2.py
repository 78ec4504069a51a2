"""mPLUG-Owl2 (paper, figure 2): ViT -> abstractor -> visual tokens among the words -> decoder."""

import torch
from torch import nn

from megatron_owl2.config import ModelConfig
from megatron_owl2.mcore import (
    ColumnLinear,
    Layout,
    MegatronModule,
    ModelType,
    VocabEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron_owl2.model.abstractor import Abstractor
from megatron_owl2.model.decoder import Decoder, KeyValueCache
from megatron_owl2.model.modality import Modality, rms_normalize
from megatron_owl2.model.vision import VisionModel


class Owl2(MegatronModule):
    """One stage of the model; with one stage, the whole of it.

    The first stage has the ViT, the abstractor and the embedding, the last one the final norm
    and the output layer. A virtual pipeline gives a rank several stages, its chunks. Parameter
    names are the same in every parallel layout.
    """

    # Asked for by megatron-core, as are `pre_process` and `post_process`.
    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(self, layout: Layout, model: ModelConfig, chunk: int = 0):
        super().__init__(layout.transformer)
        self.layout, self.model, self.vp_stage = layout, model, chunk
        stage, first, last = layout.stage(chunk)
        self.pre_process, self.post_process = stage == 0, stage == layout.stages - 1
        config = model.decoder
        size = config.hidden_size
        if self.pre_process:
            self.vision_model = VisionModel(layout, model)
            self.abstractor = Abstractor(layout, model)
            self.embedding = VocabEmbedding(
                layout, config.vocab_size, size, init_std=model.init_std
            )
        self.decoder = Decoder(layout, model, first, last)
        if self.post_process:
            self.final_norm = RMSNorm(layout, size, config.norm_eps)
            self.output_layer = ColumnLinear(
                layout,
                size,
                config.vocab_size,
                bias=False,
                init_std=model.init_std,
                sequence_parallel=True,
            )
        mean, std = torch.tensor(model.image_mean), torch.tensor(model.image_std)
        self.register_buffer("image_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", std.view(3, 1, 1), persistent=False)
        self._received = None

    def set_input_tensor(self, tensors: list[torch.Tensor] | torch.Tensor) -> None:
        """Called by the pipeline schedule with the previous stage's hidden states."""
        self._received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(
        self,
        tokens: torch.Tensor,
        image: torch.Tensor,
        vision_rows: torch.Tensor,
        modality: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        local_vision_rows: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        caches: dict[int, KeyValueCache] | None = None,
    ) -> torch.Tensor:
        """A micro-batch, as `data.batch.Batch` has it, through this stage.

        tokens, modality, position_ids, labels int64 [b, s]; image uint8 or normalised float
        [n, 3, H, W]; vision_rows int64 [images in the text * tokens per image]. Images beyond
        those that own rows take part in the backward pass with zero gradient. Under context
        parallelism all but tokens, image and vision_rows are this rank's share
        (`Batch.local_to`). Returns hidden states [s, b, h] on all but the last stage; there the
        loss per token fp32 [b, s], or without labels the logits [b, s, vocab].
        """
        if self.pre_process:
            x = self.merge(tokens, self.encode_images(image), vision_rows)
        else:
            x = self._received
        rows = vision_rows if local_vision_rows is None else local_vision_rows
        split = Modality.of(modality, rows, self.layout)
        x = self.decoder(x, split, position_ids, attention_mask=attention_mask, caches=caches)
        if not self.post_process:
            return x
        logits = self.output_layer(self.final_norm(x))
        if labels is None:
            return self.layout.gather_last(logits).transpose(0, 1)
        return vocab_parallel_cross_entropy(logits, labels.t().contiguous()).t()

    def encode_images(self, image: torch.Tensor) -> torch.Tensor:
        """Pixels [n, 3, H, W] to visual tokens [n, queries + 1, h]; uint8 is normalised first."""
        if image.dtype == torch.uint8:
            image = image.float(memory_format=torch.contiguous_format)  # batches are channels last
            image = (image / 255 - self.image_mean) / self.image_std
        return self.abstractor(self.vision_model(image.to(self.layout.dtype)))

    def merge(
        self, tokens: torch.Tensor, visual: torch.Tensor, vision_rows: torch.Tensor
    ) -> torch.Tensor:
        """Embed tokens [b, s] and put the visual tokens on their rows: [s, b, h], split over the
        ranks under context and sequence parallelism."""
        words = self.embedding(tokens).transpose(0, 1).contiguous()
        rows = visual.flatten(0, 1)[: len(vision_rows)]
        merged = words.flatten(0, 1).index_copy(0, vision_rows, rows)
        merged = self.layout.split_context(merged.view_as(words))
        return self.layout.split_sequence(merged)


def build(layout: Layout, model: ModelConfig, chunks: int) -> list[Owl2]:
    """This rank's `chunks` stages of the model, in the order of their layers."""
    return [Owl2(layout, model, chunk) for chunk in range(chunks)]


class RMSNorm(nn.Module):
    """LLaMA's norm over the last dimension, one weight for both modalities."""

    def __init__(self, layout: Layout, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=layout.dtype))
        layout.mark_sequence_parallel(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * rms_normalize(x, self.eps)
