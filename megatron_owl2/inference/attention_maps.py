"""Attention maps of the decoder: what each position attends to, layer by layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from megatron_owl2.data.image_tokens import VISION
from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.image_encoder import ImageEncoder
from megatron_owl2.inference.inputs import packed
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request, expand
from megatron_owl2.model.attention import AttentionMask
from megatron_owl2.model.decoder import DecoderLayer


@dataclass(frozen=True)
class AttentionMaps:
    """Attention probabilities of all layers for one sequence of s positions.

    maps fp32 [layers, s, s]: what position i attends to, j, as the mean over heads. vision bool [s]
    is true for the rows of images. Answer positions begin at `prompt_positions`.
    """

    maps: torch.Tensor
    vision: torch.Tensor
    prompt_positions: int


@dataclass(frozen=True)
class ModalityShares:
    """What text and vision attend to, per layer: means over queries of the probabilities that go to
    keys of a modality, fp64 [layers], nan without such queries.

    Text counts from the first image on, since none before it could attend to vision. Each pair of
    shares sums to 1.
    """

    text_on_vision: torch.Tensor
    text_on_text: torch.Tensor
    vision_on_vision: torch.Tensor
    vision_on_text: torch.Tensor


@torch.inference_mode()
def attention_maps(
    loaded: LoadedModel,
    prompt: Sequence[int],
    images: Sequence[torch.Tensor],
    answer: Sequence[int] = (),
) -> AttentionMaps:
    """The maps of one pass over a prompt (ids with -200 for images) with its answer (ids).

    Raises InferenceError as `requests.expand` does. Under torchrun all processes call it and have
    the means over all their heads.
    """
    options = GenerationOptions(max_new_tokens=1)
    before = expand(Request(prompt, images, options), loaded.config, "the prompt")
    whole = Request([*prompt, *answer], images, options)
    row = expand(whole, loaded.config, "the prompt with its answer")
    model = loaded.model
    visual = ImageEncoder(model).encode(images)
    inputs = packed([row], model.context.device)
    with _recorded(model.decoder.layers) as recorders:
        model.hidden_states(
            model.merge(inputs.tokens, visual, inputs.vision_token_index),
            inputs.modality,
            inputs.vision_token_index,
            inputs.position_ids,
        )
    maps = torch.stack([recorder.mean for recorder in recorders])
    group = model.context.groups.tp
    if group.size() > 1:
        torch.distributed.all_reduce(maps, group=group)
        maps /= group.size()
    return AttentionMaps(maps.cpu(), inputs.modality[0].cpu() == VISION, len(before.tokens))


def modality_shares(found: AttentionMaps) -> ModalityShares:
    """The shares of attention between text and vision; raises InferenceError without an image."""
    if not found.vision.any():
        raise InferenceError("without an image nothing attends to vision; show one")
    vision = found.vision
    text = ~vision & (vision.cumsum(0) > 0)
    on_vision = found.maps.double()[:, :, vision].sum(-1)
    on_text = found.maps.double()[:, :, ~vision].sum(-1)
    return ModalityShares(
        text_on_vision=on_vision[:, text].mean(-1),
        text_on_text=on_text[:, text].mean(-1),
        vision_on_vision=on_vision[:, vision].mean(-1),
        vision_on_text=on_text[:, vision].mean(-1),
    )


class _RecordingAttention(nn.Module):
    """Attention of a layer that also computes the probabilities, which its kernel returns not;
    `mean` [s, s] is their mean over heads."""

    def __init__(self, core: nn.Module):
        super().__init__()
        self.core = core
        self.mean = torch.empty(0)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: AttentionMask | None = None,
    ) -> torch.Tensor:
        """Tensors [s, 1, heads, d] of one sequence without a mask, so causal."""
        self.mean = probabilities(query[:, 0], key[:, 0]).mean(0)
        return self.core(query, key, value, mask)


def probabilities(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) under the causal mask, fp32 [heads, s, s], of query [s, heads, d]
    and key [s, kv_heads, d]."""
    length, heads, size = query.shape
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) / size**0.5
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


@contextmanager
def _recorded(layers) -> Iterator[list[_RecordingAttention]]:
    """Context in which every layer's attention is recorded."""
    modules = [cast(DecoderLayer, layer).attention for layer in layers]
    recorders = [_RecordingAttention(module.core) for module in modules]
    try:
        for module, recorder in zip(modules, recorders, strict=True):
            module.core = recorder
        yield recorders
    finally:
        for module, recorder in zip(modules, recorders, strict=True):
            module.core = recorder.core
