"""Beam search as transformers does it: hypotheses ranked by log p / length^length_penalty."""

import torch

from megatron_owl2.inference.kv_cache import KeyValueCache
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.model_runner import ModelRunner, check_numbers
from megatron_owl2.inference.requests import Completion, Request, expand
from megatron_owl2.inference.text_stream import TextStream
from megatron_owl2.inference.token_choice import penalized
from megatron_owl2.mcore import setup


@torch.inference_mode()
def beam_search(loaded: LoadedModel, request: Request) -> Completion:
    """The best hypothesis of `options.beams` for a request, without sampling.

    A hypothesis of n new tokens, its end token among them, scores log p / n^length_penalty. The
    search ends when no running hypothesis, at its present length, can beat the worst of the best
    `beams` that have ended (transformers' early_stopping=False). Stop strings cut the best one
    after the search. Raises InferenceError as `requests.expand` does.
    """
    row = expand(request, loaded.config, "the prompt")
    with setup.without_stand_in():
        ids = _search(loaded, request, row)
    stream = TextStream(loaded.tokenizer, request.options.stop)
    text = ""
    for count, token in enumerate(ids, start=1):
        text += stream.push(token)
        if stream.stopped:
            ids = ids[:count]
            break
    text += stream.finish()
    ended = len(ids) < request.options.max_new_tokens or stream.stopped
    return Completion(ids, text.strip(), "stop" if ended else "length", None, len(row.tokens))


def _search(loaded: LoadedModel, request: Request, row) -> list[int]:
    options, eos, runner = request.options, loaded.tokenizer.eos_id, ModelRunner(loaded)
    beams, length = options.beams, len(row.tokens)
    cache = KeyValueCache(
        loaded.model.context, loaded.config.decoder, beams, length + options.max_new_tokens - 1
    )
    seen = request.seen(loaded.tokenizer.vocab_size)
    logits = runner.prefill([row], request.images, cache)
    cache.reorder(torch.zeros(beams, dtype=torch.int64), length)
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []  # (score, ids), the best first
    for new in range(1, options.max_new_tokens + 1):
        log_p = _log_probabilities(logits, running, seen, options.repetition_penalty)
        if new <= options.min_new_tokens:
            log_p[:, eos] = float("-inf")
        sums = log_p + torch.tensor([total for total, _ in running], device=logits.device)[:, None]
        # Two for each beam, as every beam may end.
        count = min(2 * beams, sums.numel())
        best, places = sums.flatten().topk(count)
        check_numbers(best)
        survivors, parents = [], []
        for rank, (total, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, log_p.shape[1])
            ids = running[parent][1]
            if token == eos or new == options.max_new_tokens:
                if rank < beams:
                    kept = ids if token == eos else [*ids, token]
                    ended.append((total / new**options.length_penalty, kept))
            elif len(survivors) < beams:
                survivors.append((total, [*ids, token]))
                parents.append(parent)
        ended = sorted(ended, key=lambda one: -one[0])[:beams]
        if not survivors or new == options.max_new_tokens:
            break
        hopeless = survivors[0][0] / new**options.length_penalty <= ended[-1][0] if ended else False
        if len(ended) == beams and hopeless:
            break
        cache.reorder(torch.tensor(parents), length + new - 1)
        running = survivors
        tokens = [ids[-1] for _, ids in running]
        logits = runner.decode(tokens, [length + new - 1] * len(running), cache)
    return ended[0][1]


def _log_probabilities(logits, running, seen: list[int], penalty: float) -> torch.Tensor:
    """Log probabilities [beams, vocab] of the next tokens of running hypotheses."""
    log_p = logits[: len(running)].log_softmax(-1)
    if penalty == 1:
        return log_p
    rows = zip(log_p, running, strict=True)
    return torch.stack([penalized(row, list({*seen, *ids}), penalty) for row, (_, ids) in rows])
