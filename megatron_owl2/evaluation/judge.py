"""A judge: what a language model is asked about an answer, and whether its reply can be read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_owl2.errors import TaskError

_FIELD = re.compile(r"\{([a-z_]+)\}")
_NAME = re.compile(r"(?<![\w{}^])\{( *[A-Za-z_][\w-]* *)\}")  # meant as one; \frac{a}{b} is not
_SYSTEM_ENDS = "\n---\n"  # the line between the system's text and the user's


@dataclass(frozen=True)
class Judge:
    """How a benchmark's answers are judged, after its published script.

    `prompt` names in braces what stands there, of what `fields(answer, row)` gives for a gold row;
    a text before a line `---` is the system's. A reply that is not `readable` is asked for again,
    up to `attempts` in all: with `again` after the prompt and, from the third on, a temperature
    that is 0.5 higher each time if it is to be `warmer`.
    `variant` is the scoring rule that takes replies.
    """

    prompt: str
    fields: Callable[[str, Mapping[str, Any]], Mapping[str, str]]
    model: str
    max_tokens: int
    readable: Callable[[str], bool]
    attempts: int = 1
    again: str = ""
    warmer: bool = False
    variant: str | None = None

    def body(self, prompt: str, model: str, answer: str, row: Mapping, attempt: int) -> dict:
        """The request for OpenAI's chat completions, `attempt` counted from 1."""
        fields = self.fields(answer, row)
        parts = prompt.split(_SYSTEM_ENDS, 1)
        texts = [_FIELD.sub(lambda found: fields.get(found[1], found[0]), part) for part in parts]
        texts[-1] += self.again if attempt > 1 else ""
        roles = ("system", "user")[-len(texts) :]
        return {
            "model": model,
            "messages": [
                {"role": role, "content": text} for role, text in zip(roles, texts, strict=True)
            ],
            "temperature": 0.5 * max(0, attempt - 2) if self.warmer else 0.0,
            "max_tokens": self.max_tokens,
        }

    def check(self, prompt: str, where: str, row: Mapping[str, Any]) -> None:
        """Refusal, as TaskError, of a prompt that does not show the answer or the question, or that
        names what is no field; other braces, such as those of JSON, stand for themselves."""
        known = self.fields("", row)
        fields = f"fields of this task are {', '.join(f'{{{name}}}' for name in known)}"
        named = set(_FIELD.findall(prompt))
        if missing := [name for name in ("question", "prediction") if name not in named]:
            raise TaskError(f"{where} has no {{{missing[0]}}}; {fields}")
        if unknown := [name for name in _NAME.findall(prompt) if name not in known]:
            raise TaskError(f"{where} has {{{unknown[0]}}}, which is no field; {fields}")
