"""mPLUG-Owl2 model (paper, figure 2): ViT, abstractor, visual tokens among the words, decoder."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.mcore.initialization import without_initial_values
from megatron_owl2.mcore.linear import ColumnLinear, LinearSpec, VocabEmbedding
from megatron_owl2.mcore.packed_sequences import PackedSequences
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.abstractor import Abstractor
from megatron_owl2.model.attention import AttentionMask
from megatron_owl2.model.decoder import Decoder, LayerCache
from megatron_owl2.model.dropout import image_keys, token_keys
from megatron_owl2.model.kernels.elementwise import build_elementwise
from megatron_owl2.model.modality import Modality
from megatron_owl2.model.vision import VisionModel


class Owl2(MegatronModule):
    """Model chunk of one pipeline stage; with one pipeline stage, the whole model.

    The first pipeline stage has the ViT, the abstractor and the embedding, the last one the final
    norm and the output layer. A virtual pipeline gives a rank several chunks. Parameter
    names are the same in every parallel context.
    """

    # Asked for by megatron-core, as are `pre_process` and `post_process`.
    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(self, context: ParallelContext, model: ModelConfig, chunk: int = 0):
        super().__init__(context.transformer)
        self.context, self.model, self.vp_stage = context, model, chunk
        self.elementwise = build_elementwise(context)
        pipeline_stage, first, last = context.layer_range(chunk)
        self.pre_process = pipeline_stage == 0
        self.post_process = pipeline_stage == context.num_pipeline_stages - 1
        config = model.decoder
        size, rows = config.hidden_size, config.padded_vocab_size
        padding = rows - config.vocab_size
        if self.pre_process:
            self.vision_model = VisionModel(context, model)
            self.abstractor = Abstractor(context, model)
            self.embedding = VocabEmbedding(
                context, rows, size, init_std=model.init_std, padding=padding
            )
        self.decoder = Decoder(context, model, first, last)
        if self.post_process:
            self.final_norm = RMSNorm(context, size, config.norm_eps)
            spec = LinearSpec(
                inputs=size,
                outputs=rows,
                init_std=model.init_std,
                share_input=True,  # `head` brings it, before it chooses rows
                padding=padding,
            )
            self.output_layer = ColumnLinear(context, spec)
        mean, std = torch.tensor(model.image_mean), torch.tensor(model.image_std)
        self.register_buffer("image_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", std.view(3, 1, 1), persistent=False)
        self.image_mean: torch.Tensor
        self.image_std: torch.Tensor
        self._received: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor] | torch.Tensor) -> None:
        """Take the hidden states of the pipeline stage before; the schedule calls it."""
        self._received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(
        self,
        tokens: torch.Tensor,
        image: torch.Tensor,
        vision_token_index: torch.Tensor,
        modality: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        target_index: torch.Tensor | None = None,
        local_vision_token_index: torch.Tensor | None = None,
        sample_indices: torch.Tensor | None = None,
        packed: PackedSequences | None = None,
    ) -> torch.Tensor:
        """A micro-batch, as `data.batch.Batch` has it, through this chunk.

        tokens, modality, position_ids, labels int64 [b, s]; image uint8 or normalised float [n, 3,
        H, W]; vision_token_index int64 [images in the text * tokens per image], target_index int64
        [n], given with labels; `packed` if rows hold several samples. Images beyond those that own
        rows take part in the backward pass with zero gradient. Under context parallelism all but
        tokens, image, packed and vision_token_index are this rank's share (`Batch.local_to`).
        sample_indices int64 [b] are what dropout follows; without them, and in evaluation, there
        is none. Returns hidden states [s, b, h] on all but the last pipeline
        stage; there the losses of the rows in target_index, fp32 [n], or without labels the logits
        of all rows [b, s, vocab]."""
        if self.pre_process:
            keys = self._image_keys(sample_indices, vision_token_index, len(image))
            x = self.merge(tokens, self.encode_images(image, keys=keys), vision_token_index)
        else:
            assert self._received is not None, "the schedule hands over hidden states first"
            x = self._received
        rows = vision_token_index if local_vision_token_index is None else local_vision_token_index
        more = {"attention_mask": packed, "sample_indices": sample_indices}
        x = self.hidden_states(x, modality, rows, position_ids, **more)
        if not self.post_process:
            return x
        if labels is None:
            return self.gather_logits(self.head(x)).transpose(0, 1)
        assert target_index is not None, "labels come with the index of those that are targets"
        targets = labels.t().flatten().index_select(0, target_index)
        logits = self.head(x, target_index)
        return self.elementwise.cross_entropy(logits, targets, self.context.groups.tp)

    def hidden_states(
        self,
        x: torch.Tensor,
        modality: torch.Tensor,
        vision_token_index: torch.Tensor,
        position_ids: torch.Tensor,
        *,
        attention_mask: AttentionMask | None = None,
        caches: Sequence[LayerCache] | None = None,
        sample_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [s, b, h] behind this chunk's decoder layers.

        x [s, b, h] comes from `merge` or from the pipeline stage before; modality and position_ids
        [b, s] and vision_token_index [n] are this rank's share under context parallelism;
        `attention_mask` and `caches` are those of `Decoder`, `sample_indices` those of `forward`.
        """
        keys = None
        if self.training and sample_indices is not None:
            keys = token_keys(self.context, sample_indices, modality.shape[1])
        split = Modality.of(modality, vision_token_index, self.context, keys)
        return self.decoder(x, split, position_ids, attention_mask=attention_mask, caches=caches)

    def head(self, x: torch.Tensor, target_index: torch.Tensor | None = None) -> torch.Tensor:
        """Final norm and output layer: hidden states [s, b, h] to this rank's logits [s, b, padded
        vocab/tp], or [n, padded vocab/tp] of the n rows in target_index, which `gather_logits`
        makes whole. Those of padding are -inf, so that a loss does not see them."""
        x = self.context.copy_to_tensor_parallel(self.final_norm(x))
        if target_index is not None:
            x = x.flatten(0, 1).index_select(0, target_index)
        logits = self.output_layer(x)
        used = self.model.decoder.vocab_size - self.context.groups.tp.rank() * logits.shape[-1]
        if used < logits.shape[-1]:
            logits[..., max(used, 0) :] = float("-inf")
        return logits

    def gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocab] of all tensor-parallel ranks, without those of padding."""
        return self.context.gather_logits(logits)[..., : self.model.decoder.vocab_size]

    def encode_images(
        self, image: torch.Tensor, frames: int = 1, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pixels [n, 3, H, W] to visual tokens [n, queries + 1, h]; uint8 is normalised first.

        With `model.vision.temporal`, `frames` neighbours are a video and have the tokens of one
        image, [n / frames, queries + 1, h]. `keys` are those of `dropout.image_keys`."""
        if image.dtype == torch.uint8:
            # Batches are channels last.
            image = image.to(torch.float32, memory_format=torch.contiguous_format)
            image = (image / 255 - self.image_mean) / self.image_std
        features = self.vision_model(image.to(self.context.dtype), frames)
        return self.abstractor(features, frames, keys)

    def _image_keys(
        self, sample_indices: torch.Tensor | None, vision_token_index: torch.Tensor, count: int
    ) -> torch.Tensor | None:
        """What the abstractor's dropout follows; None: no dropout."""
        dropping = self.training and self.model.abstractor.attention_dropout > 0
        if not dropping or sample_indices is None:
            return None
        per_image = self.model.tokens_per_image
        return image_keys(self.context, sample_indices, vision_token_index, per_image, count)

    def merge(
        self, tokens: torch.Tensor, visual: torch.Tensor, vision_token_index: torch.Tensor
    ) -> torch.Tensor:
        """Embed tokens [b, s] and put the visual tokens on their rows: [s, b, h], split over the
        ranks under context and sequence parallelism."""
        words = self.embedding(tokens).transpose(0, 1).contiguous()
        rows = visual.flatten(0, 1)[: len(vision_token_index)]
        merged = words.flatten(0, 1).index_copy(0, vision_token_index, rows)
        merged = self.context.split_context(merged.view_as(words))
        return self.context.split_sequence(merged)


def build(
    context: ParallelContext, model: ModelConfig, chunks: int = 1, *, initialize: bool = True
) -> list[Owl2]:
    """This rank's model chunks, in the order of their layers, on the device of `context`.

    Unless `initialize`, weights hold no values until a checkpoint is loaded; adapters, tables and
    constants hold theirs."""
    with nullcontext() if initialize else without_initial_values(context):
        return [context.place(Owl2(context, model, chunk)) for chunk in range(chunks)]


class RMSNorm(nn.Module):
    """LLaMA's norm over the last dimension, one weight for both modalities."""

    def __init__(self, context: ParallelContext, size: int, eps: float):
        super().__init__()
        self.elementwise = build_elementwise(context)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=context.dtype))
        context.mark_sequence_parallel(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.elementwise.rms_norm(x, self.eps, self.weight)
