"""Model of lm-eval, EleutherAI's harness for text, that this project's engine computes.

python -m megatron_owl2.evaluation.adapters.lm_eval run --model megatron_owl2 \
    --model_args checkpoint=CKPT_OR_HF_DIR,precision=bf16 --tasks arc_easy --batch_size auto

All that follows the module's name is lm-eval's own command line. Texts are plain, behind a BOS;
`--apply_chat_template` asks in the model's template. Importing this needs the extra `lm-eval`.
"""

# Optional, so it may not be there to be looked into.
# pyright: reportMissingImports=false

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from megatron_owl2.data.conversation import prompt
from megatron_owl2.errors import Owl2Error, TaskError
from megatron_owl2.evaluation.adapters.generation import (
    batch_size_of,
    generation_options,
    texts_of,
)
from megatron_owl2.inference import api
from megatron_owl2.inference.requests import Request

try:
    import lm_eval.models  # noqa: F401 - lm-eval registers its own models first
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise TaskError("lm-eval is not installed: pip install 'megatron-owl2[lm-eval]'") from None

_logger = logging.getLogger(__name__)

_TOGETHER = 256  # pairs whose likelihoods are asked for at once, between two moves of the bar


@register_model("megatron_owl2")
class MegatronOwl2(TemplateLM):
    """A checkpoint or HF export under lm-eval's interface; arguments are those of `--model_args`.

    `max_gen_toks` is for tasks that name no length. Texts beyond the decoder's positions lose their
    beginning, as under lm-eval's own models, and are counted in the log. The harness always
    names a `device`; the model goes to this process's GPU, or to the CPU where there is none. Under
    torchrun the processes split the model.
    """

    def __init__(
        self,
        checkpoint: str,
        precision: str = "fp32",
        adapter: str | None = None,
        max_gen_toks: int = 256,
        batch_size: str | int = "auto",
        device: str | None = None,
    ):
        super().__init__()
        if precision not in ("fp32", "bf16"):
            raise TaskError(f"precision is {precision!r}; it must be fp32 or bf16")
        self.model = api.load(checkpoint, precision, adapter=adapter)
        self.batch_size, self.max_gen_toks = batch_size_of(batch_size), int(max_gen_toks)
        self.max_length = self.model.config.decoder.max_positions
        self._quiet = os.environ.get("RANK", "0") != "0"

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The BOS, before texts without a context."""
        return self.model.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches of requests are told apart by."""
        return f"{self.model.config.template}-{self.model.tokenizer.fingerprint}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids, behind a BOS unless `add_special_tokens` is False; `<s>` in a text is text."""
        ids = self.model.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name of the model's conversation template."""
        return self.model.config.template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text that asks a question in the model's template, with the beginning of the answer
        if that is given.

        Raises TaskError for several turns, which end in EOS, no text, and for a model whose
        tokenisation cuts a text, which lm-eval does not.
        """
        template = self.model.config.conversation
        if template.tokenization != "turns":
            raise TaskError(
                f"the model's tokenization is {template.tokenization}, and lm-eval makes ids of "
                "whole texts; leave out --apply_chat_template, or evaluate with owl2 evaluate"
            )
        turns = [(turn["role"], turn["content"]) for turn in chat_history]
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
        roles = [role for role, _ in turns]
        if roles not in (["user"], ["user", "assistant"]):
            raise TaskError("one question at a time; leave out --fewshot_as_multiturn")
        text = prompt(turns[0][1], template, system)
        return text + "".join(f" {content}" for _, content in turns[1:])

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log probabilities of whole texts, each in windows of the decoder's positions."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (total, _) in zip(owners, scored, strict=True):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, stripped, which end before a stop string."""
        asked, shortened = [], 0
        for request in requests:
            context, given = request.args
            options = generation_options(given, self.max_gen_toks)
            room = max(1, self.max_length - options.max_new_tokens + 1)
            ids = self.tok_encode(context)
            shortened += len(ids) > room
            asked.append(Request(ids[-room:], (), options))
        _tell_shortened(shortened, len(asked))
        longest = [len(one.prompt) + one.options.max_new_tokens - 1 for one in asked]
        texts = texts_of(
            self.model.generator,
            asked,
            len(asked),
            self.batch_size,
            max(longest, default=1),
            quiet=disable_tqdm or self._quiet,
        )
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log probability of the second ids after the first, and whether they are greedy."""
        found: list[tuple[float, bool]] = []
        shortened = 0
        bar = tqdm(total=len(requests), desc="likelihoods", disable=disable_tqdm or self._quiet)
        with bar:
            for first in range(0, len(requests), _TOGETHER):
                contexts, continuations = [], []
                for _, context, continuation in requests[first : first + _TOGETHER]:
                    room = self.max_length + 1 - len(continuation)  # the last id is never read
                    shortened += len(context) > room
                    contexts.append(context[-room:] if room > 0 else context[:0])
                    continuations.append(continuation)
                scores = self.model.generator.log_likelihoods(contexts, continuations)
                found += [(score.total, score.greedy) for score in scores]
                bar.update(len(scores))
        _tell_shortened(shortened, len(requests))
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:  # a window of a longer text
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found


def _tell_shortened(count: int, of: int) -> None:
    if count:
        _logger.warning(
            "%d of %d texts are longer than the decoder's positions; their beginnings are left out",
            count,
            of,
        )


def main() -> int:
    """lm-eval's command line; returns the exit code."""
    try:
        cli_evaluate()
    except Owl2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
