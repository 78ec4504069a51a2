"""Bodies of answers in OpenAI's form: a whole completion, and the events of a streamed one."""

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.inference.requests import Token
from megatron_owl2.serving.request_builder import Job

DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


class Stripped:
    """Text that comes in pieces, without the white space at its beginning and end."""

    def __init__(self) -> None:
        self._begun, self._held = False, ""

    def push(self, piece: str) -> str:
        """The text that one more piece makes sure of; white space waits for what follows it."""
        text = self._held + piece if self._begun else piece.lstrip()
        self._begun = self._begun or bool(text)
        sure = text.rstrip()
        self._held = text[len(sure) :]
        return sure


class ChatCompletion:
    """Bodies of the answer to one job, whose text is stripped as the offline engine's."""

    def __init__(self, job: Job, model: str, tokenizer: Tokenizer):
        self._job, self._tokenizer = job, tokenizer
        self._fields = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self.new_tokens = 0
        self._stripped = Stripped()

    def count(self, token: Token) -> None:
        """Count a token that the usage tells of."""
        self.new_tokens += token.token_id is not None

    def whole(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice = {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "".join(token.text for token in tokens).strip(),
                "refusal": None,
            },
            "logprobs": self._logprobs(tokens),
            "finish_reason": tokens[-1].finish_reason,
        }
        return {
            **self._fields,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(),
        }

    def opening(self) -> dict[str, Any]:
        """The first chunk, which names the role."""
        return self._chunk([self._choice({"role": "assistant", "content": ""})])

    def chunks(self, token: Token) -> Iterable[dict[str, Any]]:
        """The chunks of a token: its text, if it has any to show, and its finish reason."""
        logprobs, text = self._logprobs([token]), self._stripped.push(token.text)
        if text or logprobs:
            yield self._chunk([self._choice({"content": text}, logprobs)])
        if token.finish_reason is not None:
            yield self._chunk([self._choice({}, reason=token.finish_reason)])
            if self._job.include_usage:
                yield {**self._chunk([]), "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._job.include_usage else {}
        return {**self._fields, "object": "chat.completion.chunk", "choices": choices, **usage}

    def _choice(
        self, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Log probabilities of tokens, if they were asked for; each token by its own text."""
        if not self._job.request.options.logprobs:
            return None
        content = []
        for token in tokens:
            if token.token_id is None or token.logprob is None:
                continue
            data = self._tokenizer.piece_bytes(token.token_id)
            content.append(
                {
                    "token": data.decode(errors="replace"),
                    "logprob": token.logprob,
                    "bytes": list(data),
                    "top_logprobs": [],
                }
            )
        return {"content": content, "refusal": None} if content else None

    def _usage(self) -> dict[str, int]:
        prompt = self._job.prompt_positions
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.new_tokens,
            "total_tokens": prompt + self.new_tokens,
        }
