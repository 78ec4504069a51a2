"""Log-likelihoods of continuations: what a model gives to texts that it did not choose."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.image_encoder import ImageEncoder
from megatron_owl2.inference.inputs import packed
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.model_runner import check_numbers
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request, expand

_POSITIONS = 4096  # of one pass


@dataclass(frozen=True)
class LogLikelihood:
    """Log probability (natural) of a continuation of `tokens` ids, and whether each of them is the
    likeliest at its place."""

    total: float
    tokens: int
    greedy: bool


@torch.inference_mode()
def log_likelihoods(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    images: Sequence[Sequence[torch.Tensor]] = (),
) -> list[LogLikelihood]:
    """sum_i log p(c_i | prompt, c_1 .. c_{i-1}) of each continuation c (ids) after its prompt.

    prompts: ids with -200 in the place of images; images: per prompt its images as `Request` takes
    them, or nothing at all. Raises InferenceError as `requests.expand` does, and for an empty
    prompt or continuation.
    """
    images = images or [()] * len(prompts)
    if not len(prompts) == len(continuations) == len(images):
        raise InferenceError(
            f"{len(prompts)} prompts, {len(continuations)} continuations and images for "
            f"{len(images)}"
        )
    rows = []
    for number, (prompt, continuation, of) in enumerate(
        zip(prompts, continuations, images, strict=True), start=1
    ):
        if not len(prompt):
            raise InferenceError(f"prompt {number} is empty")
        if not continuation:
            raise InferenceError(f"continuation {number} is empty")
        outside = [i for i in continuation if not 0 <= i < loaded.tokenizer.vocab_size]
        if outside:
            raise InferenceError(
                f"continuation {number} has the id {outside[0]}, which is no piece"
            )
        # The last id is never read, as the last new token of an answer.
        request = Request([*prompt, *continuation[:-1]], of, GenerationOptions(max_new_tokens=1))
        rows.append(expand(request, loaded.config, f"prompt {number} with its continuation"))
    encoder = ImageEncoder(loaded.model)
    found: list[LogLikelihood] = []
    for group in _groups([len(row.tokens) for row in rows]):
        visual = encoder.encode([image for i in group for image in images[i]])
        targets = [continuations[i] for i in group]
        found += _pass(loaded, [rows[i] for i in group], visual, targets)
    return found


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of neighbours, which may share images, for one pass each."""
    group, positions = [], 0
    for place, length in enumerate(lengths):
        if group and positions + length > _POSITIONS:
            yield group
            group, positions = [], 0
        group.append(place)
        positions += length
    if group:
        yield group


def _pass(loaded: LoadedModel, rows, visual, targets) -> list[LogLikelihood]:
    """Likelihoods of the `targets` at the ends of rows, in one pass of the decoder."""
    model, device = loaded.model, loaded.model.context.device
    inputs = packed(rows, device)
    x = model.hidden_states(
        model.merge(inputs.tokens, visual, inputs.vision_token_index),
        inputs.modality,
        inputs.vision_token_index,
        inputs.position_ids,
        attention_mask=inputs.sequences,
    )
    ends = accumulate(len(row.tokens) for row in rows)
    places = [
        place
        for end, ids in zip(ends, targets, strict=True)
        for place in range(end - len(ids), end)
    ]
    logits = model.gather_logits(model.head(x, torch.tensor(places, device=device))).float()
    logits = logits[:, : loaded.tokenizer.vocab_size]
    best, likeliest = logits.max(-1)
    check_numbers(best)
    wanted = torch.tensor([i for ids in targets for i in ids], device=device)
    log_p = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double()
    right = likeliest == wanted
    sizes = [len(ids) for ids in targets]
    return [
        LogLikelihood(float(total.sum()), len(total), bool(greedy.all()))
        for total, greedy in zip(log_p.split(sizes), right.split(sizes), strict=True)
    ]
