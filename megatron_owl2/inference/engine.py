"""Inference engine: completions of prompts with images, their tokens as they come, likelihoods."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from megatron_owl2.data.conversation import prompt_ids
from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.beam_search import beam_search
from megatron_owl2.inference.kv_cache import position_bytes
from megatron_owl2.inference.likelihood import LogLikelihood, log_likelihoods
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Completion, FinishReason, Request, Token, expand
from megatron_owl2.inference.scheduler import Scheduler

# Requests that are answered together, and the cache that they may take: 16 of 1,024 positions of a
# 7B model in bf16. The others wait.
_MAX_BATCH, _CACHE_BYTES = 64, 8 << 30


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
        positions = max(
            (
                len(row.tokens) + request.options.max_new_tokens - 1
                for row, request in zip(rows, requests, strict=True)
            ),
            default=1,
        )
        each = positions * position_bytes(self.model.context, self.config.decoder)
        together = max(1, min(len(requests), _MAX_BATCH, _CACHE_BYTES // each))
        found = dict(self.as_they_end(requests, together, positions))
        return [found[i] for i in range(len(requests))]

    def as_they_end(
        self, requests: Iterable[Request], max_batch: int, max_positions: int
    ) -> Iterator[tuple[int, Completion]]:
        """(place of a request, its completion) as they end, in any order.

        The next request is taken when fewer than `max_batch` are under way, so their images need
        not be in memory at once; `max_positions` is the longest prompt's with its answer. Raises
        InferenceError as `requests.expand` does when it comes to such a request.
        """
        coming, scheduler = enumerate(requests), None
        under_way: dict[int, tuple[int, Request, list[Token]]] = {}
        while True:
            while len(under_way) < max_batch and (taken := next(coming, None)):
                place, request = taken
                if request.options.beams > 1:
                    yield place, beam_search(self.loaded, request)
                    continue
                scheduler = scheduler or Scheduler(self.loaded, max_batch, max_positions)
                number = scheduler.add(request, f"prompt {place + 1}", text=False)
                under_way[number] = place, request, []
            if not under_way or scheduler is None:
                return
            for token in scheduler.step():
                place, request, tokens = under_way[token.request]
                tokens.append(token)
                if token.finish_reason is not None:
                    del under_way[token.request]
                    yield place, self._completion(request, tokens)

    def stream(self, request: Request) -> Iterator[Token]:
        """The tokens of one request as they come. Raises InferenceError as `complete` does."""
        positions = len(expand(request, self.config, "the prompt").tokens)
        scheduler = Scheduler(self.loaded, 1, positions + request.options.max_new_tokens - 1)
        scheduler.add(request)
        return _steps(scheduler)

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
        template = self.config.conversation
        ids = [
            prompt_ids(p, self.tokenizer, template) if isinstance(p, str) else p for p in prompts
        ]
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

    def _completion(self, request: Request, tokens: list[Token]) -> Completion:
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
            prompt_positions=len(expand(request, self.config, "the prompt").tokens),
        )


def _steps(scheduler: Scheduler) -> Iterator[Token]:
    while scheduler.active or scheduler.waiting:
        yield from scheduler.step()


def _requests(prompts, images, max_new_tokens: int, min_new_tokens: int) -> list[Request]:
    if len(prompts) != len(images):
        raise InferenceError(f"{len(prompts)} prompts, but images for {len(images)}")
    options = GenerationOptions(max_new_tokens, min_new_tokens)
    return [Request(ids, of, options) for ids, of in zip(prompts, images, strict=True)]
