"""Tokenizer for vLLM: prompts to ids by the rule of exported processors.

vLLM tokenises a prompt before it places images, so the rule about control tokens, pieces between
images and BOS, which an exported processor has, must be the tokenizer's.
"""

from functools import cached_property
from typing import Any

from transformers import BatchEncoding

from megatron_owl2.convert.remote_code.owl2.configuration_mplug_owl2 import MPLUGOwl2Config
from megatron_owl2.convert.remote_code.owl2.processing_mplug_owl2 import MPLUGOwl2Processor
from megatron_owl2.convert.remote_code.owl2.prompt_mplug_owl2 import (
    default_chat_template,
    mark_messages,
    mark_text,
    prompt_ids,
)
from megatron_owl2.convert.remote_code.owl2.tokenization_mplug_owl2 import MPLUGOwl2Tokenizer


class Owl2Tokenizer(MPLUGOwl2Tokenizer):
    """The exported tokenizer, whose texts are prompts with `<|image|>` for an image.

    An image is one id, `placeholder`, the first behind the vocabulary, which vLLM replaces by the
    image's rows and refuses where there is no image.
    """

    placeholder: int

    @classmethod
    def from_pretrained(
        cls, path, *args, trust_remote_code=False, download_dir=None, revision=None, **kwargs
    ) -> "Owl2Tokenizer":
        """The tokenizer of an export, with its chat template; no remote code is run."""
        where = {"cache_dir": download_dir, "revision": revision or "main"}
        tokenizer = super().from_pretrained(path, *args, **where, **kwargs)
        tokenizer.placeholder = MPLUGOwl2Config.from_pretrained(path, **where).vocab_size
        settings, _ = MPLUGOwl2Processor.get_processor_dict(path, **where)
        tokenizer.chat_template = settings.get("chat_template") or default_chat_template(
            settings.get("system", ""), settings.get("after_image", "")
        )
        return tokenizer

    def __call__(
        self,
        text: str | list[str],
        text_pair: None = None,
        add_special_tokens: bool = True,
        truncation: bool | None = False,
        max_length: int | None = None,
        **_: Any,
    ) -> BatchEncoding:
        """Ids of one or several plain strings, with a BOS unless `add_special_tokens` is off."""
        if not isinstance(text, str):
            rows = [self(one, None, add_special_tokens, truncation, max_length) for one in text]
            return BatchEncoding({name: [row[name] for row in rows] for name in rows[0]})
        ids = prompt_ids(mark_text(text), self, self.placeholder, add_special_tokens)
        if truncation and max_length is not None:
            ids = ids[:max_length] if self.truncation_side == "right" else ids[-max_length:]
        return BatchEncoding({"input_ids": ids, "attention_mask": [1] * len(ids)})

    def encode(self, text: str, *args, **kwargs) -> list[int]:
        return self(text, None, *args, **kwargs)["input_ids"]

    def apply_chat_template(self, conversation, *args, **kwargs) -> list[int]:
        """Ids of messages, in which texts are text and parts of the type image are images.

        They are ids whatever `tokenize` says: the text could not tell the two apart.
        """
        kwargs |= {"tokenize": False, "return_dict": False}
        marked = super().apply_chat_template(mark_messages(conversation), *args, **kwargs)
        return prompt_ids(marked, self, self.placeholder)

    @property
    def max_token_id(self) -> int:
        return len(self) - 1

    @cached_property
    def max_chars_per_token(self) -> int:
        return max(map(len, self.get_vocab()))
