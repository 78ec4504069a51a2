"""Text of an answer as its tokens come: whole characters, up to a stop string."""

from collections.abc import Sequence

from megatron_owl2.data.tokenizer import Tokenizer

_BROKEN = "\ufffd"  # what the bytes of an unfinished character decode to


class TextStream:
    """Text that the tokens so far have made sure of; its pieces joined are the text of all ids.

    Text that may turn out to begin a stop string or an unfinished character waits. `stopped` tells
    that a stop string has come; it and all behind it are left out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._context = self._decoded = 0  # ids that the next ones are decoded behind; those done
        self._waiting = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that one more token makes sure of."""
        special = self._tokenizer.unk_id, self._tokenizer.bos_id, self._tokenizer.eos_id
        if token not in special:  # decode leaves them out
            self._ids.append(token)
            self._waiting += self._new_text(last=False)
        return self._release(last=False)

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        self._waiting += self._new_text(last=True)
        return self._release(last=True)

    def _new_text(self, *, last: bool) -> str:
        """Text of the ids that were not decoded. They are decoded behind the ones before, since a
        text's first piece loses its space."""
        before = self._tokenizer.decode(self._ids[self._context : self._decoded])
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith(_BROKEN) and not last:
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return text[len(before) :]

    def _release(self, *, last: bool) -> str:
        found = [self._waiting.find(stop) for stop in self._stop]
        found = [place for place in found if place >= 0]
        if found:
            self.stopped = True
            text, self._waiting = self._waiting[: min(found)], ""
            return text
        kept = 0 if last else max(map(self._begun, self._stop), default=0)
        text = self._waiting[: len(self._waiting) - kept]
        self._waiting = self._waiting[len(text) :]
        return text

    def _begun(self, stop: str) -> int:
        """Number of characters at the end of the text that begin a stop string."""
        for length in range(min(len(stop) - 1, len(self._waiting)), 0, -1):
            if self._waiting.endswith(stop[:length]):
                return length
        return 0
