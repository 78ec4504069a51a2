"""Texts and images to the inputs of mPLUG-Owl2."""

import json
import re
from collections.abc import Iterable

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .text_options_mplug_owl2 import TextOptions

IMAGE = "<|image|>"
# Marks in the texts of messages; no text holds such code points. After every `<`, so that no text
# spells a placeholder or `</s>`; before every answer, which training tokenises by itself.
_TEXT, _ANSWER = "\ud800", "\ud801"
# The template of official inference, where `system` and `after_image` are empty. `system` comes
# first unless there is a system message, `after_image` after the images that begin a question.
_CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is iterable and content is not mapping and content -%}
        {%- for part in content -%}
            {%- if part['type'] == 'image' -%}
                {{- '<|image|>' -}}
            {%- elif part['type'] == 'text' and part['text'] is string -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception("a part of a content must be of type 'image', or of type "
                    ~ "'text' with a 'text'; found " ~ part) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{- raise_exception("a message must have a 'content': a text or a list of parts") -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro question(content) -%}
    {%- set pieces = text(content).split('<|image|>') -%}
    {%- set state = namespace(begun=pieces | length == 1) -%}
    {%- for piece in pieces -%}
        {{- '' if loop.first else '<|image|>' -}}
        {%- set piece = piece.rstrip() if loop.last and not loop.first else piece -%}
        {%- if state.begun -%}
            {{- piece -}}
        {%- elif piece.strip() or loop.last -%}
            {%- set state.begun = true -%}
            {{- ('' if loop.first else after_image) + piece.lstrip() -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if loop.first and system and message['role'] != 'system' -%}
        {{- system + ' ' -}}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'ASSISTANT: ' + text(message['content']) + eos_token -}}
    {%- elif message['role'] == 'user' -%}
        {{- 'USER: ' + question(message['content']) + ' ' -}}
    {%- elif message['role'] == 'system' -%}
        {%- set given = text(message['content']) -%}
        {%- set given = given if given | trim else (system if loop.first else '') -%}
        {{- given + ' ' if given else '' -}}
    {%- else -%}
        {{- raise_exception("the 'role' of a message must be system, user or assistant; found "
            ~ message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}"""


class MPLUGOwl2Processor(ProcessorMixin):
    """Tokenizer and image processor, and the rows that an image takes in the text."""

    def __init__(
        self,
        image_processor,
        tokenizer,
        tokens_per_image=65,
        system="",
        after_image="",
        chat_template=None,
    ):
        texts = {"system": system, "after_image": after_image}
        given = "".join(f"{{%- set {k} = {json.dumps(v)} -%}}\n" for k, v in texts.items())
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or given + _CHAT_TEMPLATE
        )
        self.tokens_per_image = tokens_per_image
        self.system, self.after_image = system, after_image

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "modality", "pixel_values"]

    def apply_chat_template(self, conversation, *args, tokenize=False, **keywords):
        """ProcessorMixin's, whose ids are those of training, where texts of messages stay texts.

        With `tokenize=True` a `<|image|>`, `</s>` or `<s>` that a message spells is text, and only
        parts of the type image are images. The text that comes without it does not tell them apart.
        """
        if tokenize:
            conversation = [_marked(entry) for entry in conversation]
        return super().apply_chat_template(conversation, *args, tokenize=tokenize, **keywords)

    def __call__(self, images=None, text=None, videos=None, audio=None, **keywords) -> BatchFeature:
        """One text or several with a `<|image|>` for each image, to padded inputs.

        images: the images in order, flat, or one list for each text; what the image processor
        takes. In place of an image a list of images, frames, fills one placeholder together,
        and so do several images of a text with one placeholder when there is a list per text.
        In texts `</s>` ends a turn; in messages of `apply_chat_template` it is text.
        `keywords` are those of a tokenizer that `TextOptions` has, also in a dict `text_kwargs`.
        Returns input_ids (0 at image rows and padding), attention_mask, modality (1 at image
        rows, else 0), all int64 [b, s], and pixel_values [n, 3, H, W] if there are any. Raises
        ValueError if placeholders and images differ in number, without text, if truncation would
        cut an image, and for what a keyword cannot be; TypeError for a keyword that is unknown.
        """
        if videos is not None or audio is not None:
            raise ValueError("this model reads neither videos nor audio; give frames as images")
        options = TextOptions.of(self.tokenizer, keywords)
        texts = _texts(text, images)
        frames = _frames(images, [t.count(IMAGE) for t in texts])
        sizes = iter([len(group) * self.tokens_per_image for group in frames])
        rows = [self._row(t, sizes, options.add_special_tokens) for t in texts]
        if options.add_special_tokens and ([], []) in rows:
            raise ValueError(f"text {rows.index(([], [])) + 1} of {len(rows)} is empty")
        cut = [options.truncated(row, i + 1) for i, row in enumerate(rows)]
        data = options.padded(cut)
        if frames:
            values = self.image_processor(sum(frames, []), return_tensors="pt")["pixel_values"]
            data["pixel_values"] = values if options.return_tensors else list(values.numpy())
        return BatchFeature(data, tensor_type=options.return_tensors)

    def _row(self, text: str, sizes, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Ids and modality of a text, the next of `sizes` rows in place of every placeholder.

        Every piece between placeholders is tokenised alone and the first BOS is kept. A text that
        starts with the placeholder has no first piece; the official code then keeps the BOS of
        every later piece.
        """
        bos = [self.tokenizer.bos_token_id] if add_special_tokens else []
        first, *later = text.split(IMAGE)
        ids = bos + self._encode(first) if first else []
        modality = [0] * len(ids)
        for piece in later:
            size = next(sizes)
            words = self._encode(piece)
            if piece and not first:
                words = bos + words
            ids += [0] * size + words
            modality += [1] * size + [0] * len(words)
        return ids, modality

    def _encode(self, text: str) -> list[int]:
        """Ids of a text without BOS; `</s>` ends a turn and is the only special piece."""
        ids = []
        for number, turn in enumerate(text.split(self.tokenizer.eos_token)):
            ids += [self.tokenizer.eos_token_id] if number else []
            for piece in re.split(f" ?{_ANSWER}", turn):
                words = piece.replace(_TEXT, "")
                ids += self.tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
        return ids


def _marked(entry):
    """A message, or a conversation of them, with the marks of `_TEXT` and `_ANSWER` in its texts;
    the template refuses what is neither."""
    if isinstance(entry, (list, tuple)):
        return [_marked(message) for message in entry]
    if not isinstance(entry, dict):
        return entry
    content, mark = entry.get("content"), _ANSWER if entry.get("role") == "assistant" else ""
    if isinstance(content, str):
        return entry | {"content": mark + _literal(content)}
    if not isinstance(content, (list, tuple)) or not content:
        return entry
    parts = [
        part | {"text": _literal(part["text"])}
        if isinstance(part, dict) and isinstance(part.get("text"), str)
        else part
        for part in content
    ]
    return entry | {"content": [{"type": "text", "text": mark}, *parts] if mark else parts}


def _literal(text: str) -> str:
    """A text that spells no control token; raises ValueError for a code point that is none."""
    if not text.isascii():
        text.encode()
    return text.replace("<", f"<{_TEXT}")


def _texts(text, images) -> list[str]:
    """The texts; raises ValueError if there are none, or for what is no text."""
    texts = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
    order = "images come first and text second; name them: processor(images=..., text=...)"
    if not texts or text is None:
        raise ValueError(f"give text: one string or several; {order}")
    for entry in texts:
        if not isinstance(entry, str):
            raise ValueError(f"text holds {type(entry).__name__}, not a string; {order}")
    given = images if isinstance(images, (list, tuple)) else [images]
    if any(isinstance(image, str) and IMAGE in image for image in given):
        raise ValueError(f"images hold a text with {IMAGE}; {order}")
    return texts


def _frames(images, placeholders: list[int]) -> list[list]:
    """The images of every placeholder; `placeholders` counts them in each text."""
    images = [] if images is None else images
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    lists = [entry is None or isinstance(entry, (list, tuple)) for entry in images]
    if all(lists) and len(images) == len(placeholders):  # a list for each text, None for no image
        groups = zip([entry or [] for entry in images], placeholders, strict=True)
        alone = [[group] if n == 1 and len(group) > 1 else group for group, n in groups]
        images = sum((list(group) for group in alone), [])
    if len(images) != sum(placeholders):
        raise ValueError(
            f"{sum(placeholders)} placeholders {IMAGE}, but {len(images)} images; write one "
            "placeholder for each image"
        )
    frames = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]
    if any(not group or any(image is None for image in group) for group in frames):
        raise ValueError("an image is an empty list or None; leave out its placeholder as well")
    return frames
