"""Stand-in for a tokenizer where only ids matter."""

from dataclasses import dataclass


@dataclass(frozen=True)
class IdTokenizer:
    """LLaMA's special ids; every id has the empty text."""

    vocab_size: int
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def decode(self, ids) -> str:
        return ""
