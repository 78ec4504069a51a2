"""Prompts of mPLUG-Owl2: the chat template, and which characters of a text are control tokens.

Text of users is text, whatever it spells: turns are ended by the template alone. The place of an
image is that of a part of the type image, or `<|image|>` in a plain string.
"""

import json
import re

IMAGE = "<|image|>"
# Marks in the texts of messages; no text holds such code points. After every `<`, so that no text
# spells a placeholder or `</s>`; before every answer, which training tokenises by itself.
TEXT_MARK, ANSWER_MARK = "\ud800", "\ud801"
# The template of official inference, where `system` and `after_image` are empty. `system` comes
# first unless there is a system message, `after_image` after the images that begin a question.
_TEMPLATE = """\
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


class RenderedPrompt(str):
    """A prompt of the chat template: its text, with the control tokens told apart in `marked`.

    What str's methods make of it is a plain string, in which `</s>` is text.
    """

    marked: str

    def __new__(cls, text: str, marked: str | None = None):
        prompt = super().__new__(cls, unmarked(text))
        prompt.marked = text if marked is None else marked
        return prompt

    def __getnewargs__(self):
        return str(self), self.marked


def default_chat_template(system: str, after_image: str) -> str:
    """The Jinja template; `system` and `after_image` are those of the model's training."""
    texts = {"system": system, "after_image": after_image}
    return "".join(f"{{%- set {k} = {json.dumps(v)} -%}}\n" for k, v in texts.items()) + _TEMPLATE


def mark_messages(entry):
    """A message, or a conversation of them, with the marks in its texts; the template refuses what
    is neither. Raises ValueError for a text with a code point that is no character."""
    if isinstance(entry, (list, tuple)):
        return [mark_messages(message) for message in entry]
    if not isinstance(entry, dict):
        return entry
    content = entry.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]  # transformers 5.4 wants parts
    if not isinstance(content, (list, tuple)) or not content:
        return entry
    parts = [
        part | {"text": _literal(part["text"])}
        if isinstance(part, dict) and isinstance(part.get("text"), str)
        else part
        for part in content
    ]
    if entry.get("role") == "assistant":
        parts.insert(0, {"type": "text", "text": ANSWER_MARK})
    return entry | {"content": parts}


def mark_text(text: str, placeholders: tuple[str, ...] = (IMAGE,)) -> str:
    """A prompt with the marks: those of the template, or of a plain string, whose only control
    tokens are placeholders. Raises ValueError as `mark_messages` does."""
    if is_rendered(text):
        return text.marked
    pieces = re.split(f"({'|'.join(map(re.escape, placeholders))})", text)
    return "".join(piece if piece in placeholders else _literal(piece) for piece in pieces)


def unmarked(marked: str) -> str:
    """The text without the marks."""
    return marked.replace(TEXT_MARK, "").replace(ANSWER_MARK, "")


def is_rendered(text: str) -> bool:
    """Whether a prompt is one of the template, be it that of another export's code."""
    return hasattr(text, "marked")


def prompt_ids(marked: str, tokenizer, placeholder: int, add_bos: bool = True) -> list[int]:
    """Ids of a prompt with marks, `placeholder` for every image.

    Every piece between placeholders is tokenised alone and the first BOS is kept. A text that
    starts with the placeholder has no first piece; the official code then keeps the BOS of
    every later piece.
    """
    bos = [tokenizer.bos_token_id] if add_bos else []
    first, *later = marked.split(IMAGE)
    ids = bos + turn_ids(first, tokenizer) if first else []
    for piece in later:
        ids += [placeholder, *(bos if piece and not first else []), *turn_ids(piece, tokenizer)]
    return ids


def turn_ids(marked: str, tokenizer) -> list[int]:
    """Ids without BOS; `</s>` without a mark ends a turn and is the only special piece."""
    ids = []
    for number, turn in enumerate(marked.split(tokenizer.eos_token)):
        ids += [tokenizer.eos_token_id] if number else []
        for piece in re.split(f" ?{ANSWER_MARK}", turn):
            ids += tokenizer.text_ids(unmarked(piece))
    return ids


def _literal(text: str) -> str:
    """A text that spells no control token."""
    if not text.isascii():
        text.encode()
    return text.replace("<", f"<{TEXT_MARK}")
