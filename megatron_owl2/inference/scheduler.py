"""Continuous batching: requests join the batch and leave it between decode steps.

Prompts are read in groups, packed in one row, and their keys and values go to rows of one
preallocated cache. A decode step then gives one token to every sequence under way, each at its own
position, so a request gets the answer that it gets alone.
"""

from collections import deque
from dataclasses import dataclass

import torch

from megatron_owl2.data.image_tokens import ExpandedRow
from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.kv_cache import KeyValueCache
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.model_runner import ModelRunner, check_numbers
from megatron_owl2.inference.requests import FinishReason, Request, Token, expand
from megatron_owl2.inference.text_stream import TextStream
from megatron_owl2.inference.token_choice import TokenChooser
from megatron_owl2.mcore import setup

# Positions of prompts that are read in one pass: sequences under way wait for no more.
_PREFILL_POSITIONS = 4096


@dataclass
class _Sequence:
    """A request under way or waiting; `length` counts the positions in the cache."""

    number: int
    request: Request
    prompt: ExpandedRow
    chooser: TokenChooser
    text: TextStream | None
    length: int = 0
    last: int = 0
    new: int = 0  # tokens so far
    ended: bool = False


class Scheduler:
    """Continuous batching of requests to one model, by one thread.

    At most `max_batch` sequences of at most `max_positions` positions (by default the decoder's)
    are under way; the others wait in the order in which they came. Under torchrun all processes
    make the same calls in the same order.
    """

    def __init__(self, loaded: LoadedModel, max_batch: int = 32, max_positions: int | None = None):
        self.config, self.tokenizer = loaded.config, loaded.tokenizer
        decoder = loaded.config.decoder
        positions = min(max_positions or decoder.max_positions, decoder.max_positions)
        self._cache = KeyValueCache(loaded.model.context, decoder, max_batch, positions)
        self._waiting: deque[_Sequence] = deque()
        self._active: list[_Sequence] = []
        self._runner, self._ranks = ModelRunner(loaded), loaded.model.context.groups.tp
        self._count = 0
        self._prefilled = False  # in the last step

    @property
    def active(self) -> int:
        """Number of sequences under way."""
        return sum(not sequence.ended for sequence in self._active)

    @property
    def waiting(self) -> int:
        """Number of requests that no step has taken yet."""
        return len(self._waiting)

    def add(self, request: Request, name: str = "the prompt", *, text: bool = True) -> int:
        """Queue a request; returns its number, which its tokens carry.

        Without `text` the tokens carry none, which saves time, unless there are stop strings.
        Raises InferenceError as `requests.expand` does; `name` is what it calls the prompt.
        """
        if request.options.beams > 1:
            raise InferenceError("beams above 1 are not for continuous batching; use Generator")
        row = expand(request, self.config, name, self._cache.positions)
        self._count += 1
        chooser = TokenChooser(request.options, request.seen(self.tokenizer.vocab_size))
        needed = text or request.options.stop
        stream = TextStream(self.tokenizer, request.options.stop) if needed else None
        self._waiting.append(_Sequence(self._count, request, row, chooser, stream))
        return self._count

    def cancel(self, number: int) -> None:
        """Forget a request; its place is free for the next step. Unknown numbers are ignored."""
        self._waiting = deque(s for s in self._waiting if s.number != number)
        for sequence in self._active:
            sequence.ended |= sequence.number == number

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """New tokens of one pass: the first ones of a group of prompts, or one of every sequence.

        After a group of prompts the sequences under way get a token before the next group. []
        without work. Raises InferenceError if the model's logits are not numbers.
        """
        with setup.without_stand_in():
            return self._step()

    def _step(self) -> list[Token]:
        self._leave()
        room = self._cache.rows - len(self._active)
        if self._waiting and room and not (self._prefilled and self._active):
            self._prefilled = True
            return self._prefill(self._next_group(room))
        self._prefilled = False
        return self._decode() if self._active else []

    def _leave(self) -> None:
        """Close the gaps of sequences that ended with the last ones."""
        for row in reversed(range(len(self._active))):
            if self._active[row].ended:
                last = self._active.pop()
                if row < len(self._active):
                    self._active[row] = last
                    self._cache.move(len(self._active), row, last.length)

    def _next_group(self, room: int) -> list[_Sequence]:
        """The first of those waiting, as many as fit into one pass."""
        group, positions = [], 0
        while self._waiting and len(group) < room:
            positions += len(self._waiting[0].prompt.tokens)
            if group and positions > _PREFILL_POSITIONS:
                break
            group.append(self._waiting.popleft())
        return group

    def _prefill(self, group: list[_Sequence]) -> list[Token]:
        images = [image for sequence in group for image in sequence.request.images]
        first = len(self._active)
        logits = self._runner.prefill([s.prompt for s in group], images, self._cache, first)
        self._active += group
        for sequence in group:
            sequence.length = len(sequence.prompt.tokens)
        return self._choose(logits, group)

    def _decode(self) -> list[Token]:
        tokens = [sequence.last for sequence in self._active]
        positions = [sequence.length for sequence in self._active]
        logits = self._runner.decode(tokens, positions, self._cache)
        for sequence in self._active:
            sequence.length += 1
        return self._choose(logits, self._active)

    def _choose(self, logits: torch.Tensor, sequences: list[_Sequence]) -> list[Token]:
        """The next tokens of sequences by their logits [b, vocab]."""
        wants = [sequence.request.options for sequence in sequences]
        chosen = logits
        if short := [i for i, s in enumerate(sequences) if s.new < wants[i].min_new_tokens]:
            chosen = logits.clone() if any(options.logprobs for options in wants) else logits
            chosen[short, self.tokenizer.eos_id] = float("-inf")
        best, greedy = chosen.max(-1)
        check_numbers(best)
        choices = greedy.tolist()
        for i, sequence in enumerate(sequences):
            if not sequence.chooser.greedy:
                choices[i] = sequence.chooser.choose(chosen[i])
        if self._ranks.size() > 1 and not all(s.chooser.greedy for s in sequences):
            # Sums on a GPU need not be the same to the bit twice, and ranks must not part.
            drawn = torch.tensor(choices, device=logits.device)
            torch.distributed.broadcast(drawn, group=self._ranks, group_src=0)
            choices = drawn.tolist()
        return [
            self._advance(sequence, choices[i], logits[i]) for i, sequence in enumerate(sequences)
        ]

    def _advance(self, sequence: _Sequence, token: int, logits: torch.Tensor) -> Token:
        """Take one more token into a sequence."""
        options, stream = sequence.request.options, sequence.text
        sequence.last, sequence.new = token, sequence.new + 1
        logprob = float(logits.log_softmax(-1)[token]) if options.logprobs else None
        ends = token == self.tokenizer.eos_id
        full = sequence.new == options.max_new_tokens
        text, stopped = "", False
        if stream is not None:
            text = "" if ends else stream.push(token)
            if ends or full:
                text += stream.finish()
            stopped = stream.stopped
        reason: FinishReason | None = "stop" if ends or stopped else "length" if full else None
        sequence.ended = reason is not None
        return Token(sequence.number, None if ends else token, text, logprob, reason)
