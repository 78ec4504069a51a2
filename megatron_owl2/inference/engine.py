"""Inference engine: completions of prompts with images, their tokens as they come, likelihoods."""

from collections.abc import Iterator, Sequence

import torch

from megatron_owl2.data.conversation import prompt_ids
from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.beam_search import beam_search
from megatron_owl2.inference.likelihood import LogLikelihood, log_likelihoods
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Completion, FinishReason, Request, Token, expand
from megatron_owl2.inference.scheduler import Scheduler

_MAX_BATCH = 64


class Generator:
    """Generation with one loaded model. Under torchrun all processes make the same calls."""

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        self.model, self.config, self.tokenizer = loaded.model, loaded.config, loaded.tokenizer

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions of requests, computed together; each is the one that it gets alone.

        Raises InferenceError as `requests.expand` does, naming the request by its place, before
        anything is computed.
        """
        rows = [
            expand(request, self.config, f"prompt {number}")
            for number, request in enumerate(requests, start=1)
        ]
        found: dict[int, Completion] = {}
        together = [i for i, request in enumerate(requests) if request.options.beams == 1]
        for i, request in enumerate(requests):
            if request.options.beams > 1:
                found[i] = beam_search(self.loaded, request)
        tokens: dict[int, list[Token]] = {i: [] for i in together}
        for i, token in self._tokens([requests[i] for i in together], text=False):
            tokens[together[i]].append(token)
        for i, of_request in tokens.items():
            found[i] = self._completion(requests[i], of_request, len(rows[i].tokens))
        return [found[i] for i in range(len(requests))]

    def stream(self, request: Request) -> Iterator[Token]:
        """The tokens of one request as they come. Raises InferenceError as `complete` does."""
        return (token for _, token in self._tokens([request], text=True))

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        images: Sequence[Sequence[torch.Tensor]],
        max_new_tokens: int,
        min_new_tokens: int = 1,
    ) -> list[str]:
        """The greedy answers, stripped, to prompts with one `<|image|>` for each of their images,
        or to ids with -200 in its place.

        images: per prompt its images in order, as `Request` takes them. Raises InferenceError.
        """
        ids = [prompt_ids(p, self.tokenizer) if isinstance(p, str) else p for p in prompts]
        requests = _requests(ids, images, max_new_tokens, min_new_tokens)
        return [completion.text for completion in self.complete(requests)]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Sequence[torch.Tensor]],
        max_new_tokens: int,
        min_new_tokens: int = 1,
    ) -> list[list[int]]:
        """The ids of greedy answers to prompts of ids; EOS ends an answer and is left out.

        Raises InferenceError as `complete` does.
        """
        requests = _requests(prompts, images, max_new_tokens, min_new_tokens)
        return [completion.token_ids for completion in self.complete(requests)]

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        images: Sequence[Sequence[torch.Tensor]] = (),
    ) -> list[LogLikelihood]:
        """Log probabilities of continuations after their prompts; see `likelihood`."""
        return log_likelihoods(self.loaded, prompts, continuations, images)

    def _tokens(self, requests: Sequence[Request], *, text: bool) -> Iterator[tuple[int, Token]]:
        """(index of the request, token) until all have ended."""
        if not requests:
            return
        rows = [expand(r, self.config, f"prompt {n}") for n, r in enumerate(requests, start=1)]
        positions = max(
            len(row.tokens) + request.options.max_new_tokens - 1
            for row, request in zip(rows, requests, strict=True)
        )
        scheduler = Scheduler(self.loaded, min(len(requests), _MAX_BATCH), positions)
        numbers = {scheduler.add(request, text=text): i for i, request in enumerate(requests)}
        while scheduler.active or scheduler.waiting:
            for token in scheduler.step():
                yield numbers[token.request], token

    def _completion(self, request: Request, tokens: list[Token], positions: int) -> Completion:
        """The completion that tokens make, which carry text only if there are stop strings."""
        reason: FinishReason | None = tokens[-1].finish_reason
        assert reason is not None, "the last token ends the answer"
        ids = [token.token_id for token in tokens if token.token_id is not None]
        stop, logprobs = request.options.stop, [t.logprob for t in tokens if t.logprob is not None]
        text = "".join(token.text for token in tokens) if stop else self.tokenizer.decode(ids)
        return Completion(
            token_ids=ids,
            text=text.strip(),
            finish_reason=reason,
            logprobs=logprobs[: len(ids)] if request.options.logprobs else None,
            prompt_positions=positions,
        )


def _requests(prompts, images, max_new_tokens: int, min_new_tokens: int) -> list[Request]:
    if len(prompts) != len(images):
        raise InferenceError(f"{len(prompts)} prompts, but images for {len(images)}")
    options = GenerationOptions(max_new_tokens, min_new_tokens)
    return [Request(ids, of, options) for ids, of in zip(prompts, images, strict=True)]
