"""Model runner: the passes of a loaded model over a key/value cache, prompts and decode steps."""

from collections.abc import Sequence

import torch

from megatron_owl2.data.image_tokens import ExpandedRow
from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.image_encoder import ImageEncoder
from megatron_owl2.inference.inputs import packed
from megatron_owl2.inference.kv_cache import KeyValueCache
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.text_decoder import TextDecoder


class ModelRunner:
    """Passes of a model that end in the logits fp32 [b, vocab] of the next tokens.

    The vocabulary is that of the tokenizer; the model may embed ids without a text.
    """

    def __init__(self, loaded: LoadedModel):
        self.model, self.pieces = loaded.model, loaded.tokenizer.vocab_size
        self._images, self._decoder = ImageEncoder(loaded.model), TextDecoder(loaded.model)

    def prefill(
        self,
        prompts: Sequence[ExpandedRow],
        images: Sequence[torch.Tensor],
        cache: KeyValueCache,
        first: int = 0,
    ) -> torch.Tensor:
        """Read prompts with their images, in order, into the rows of the cache from `first` on."""
        device, model = self.model.context.device, self.model
        visual, inputs = self._images.encode(images), packed(prompts, device)
        lengths = [len(prompt.tokens) for prompt in prompts]
        x = model.hidden_states(
            model.merge(inputs.tokens, visual, inputs.vision_token_index),
            inputs.modality,
            inputs.vision_token_index,
            inputs.position_ids,
            attention_mask=inputs.sequences,
            caches=cache.prefill(first, lengths),
        )
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        return self._logits(x[last, 0])

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], cache: KeyValueCache
    ) -> torch.Tensor:
        """Read one more text token of every sequence of the first rows, each at its position."""
        device = self.model.context.device
        longest, together = max(positions) + 1, min(positions) == max(positions)
        places, mask = torch.tensor(positions, device=device), None
        if not together:  # added to the scores, in their type, as attention would make it anyway
            allowed = torch.arange(longest, device=device) <= places[:, None, None, None]
            mask = torch.zeros(allowed.shape, dtype=self.model.context.dtype, device=device)
            mask.masked_fill_(~allowed, float("-inf"))
        caches = cache.decode(places, longest, together=together)
        x = self._decoder(torch.tensor(tokens, device=device), places, caches, mask)
        return self._logits(x)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits by the last hidden states [b, h]."""
        logits = self.model.gather_logits(self.model.head(x.unsqueeze(0)))[0].float()
        return logits[:, : self.pieces]


def check_numbers(best: torch.Tensor) -> None:
    """Raise InferenceError unless the greatest logits [b] are numbers."""
    if best.isnan().any():
        raise InferenceError(
            "the model's logits are not numbers: its weights are damaged, or it diverged"
        )
