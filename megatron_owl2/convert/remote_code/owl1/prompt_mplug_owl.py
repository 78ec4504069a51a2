"""Prompts of mPLUG-Owl, version 1: the chat template, and which pieces are tokenised alone.

Text of users is text, as in version 2: media are parts of the type image or video, or `<image>` and
`<|video|>` in a plain string. The released code tokenises differently in training and in inference,
so that a model is not asked as it was trained; `tokenization` is the choice:

- "turns": a question with its labels, between media, is one piece; an answer is another, behind
  which comes EOS.
- "official_train": media, `AI: ` and a newline with `Human: `, wherever they stand, are pieces, and
  so is what lies between them; behind a piece that follows `AI: ` comes EOS, but not at the end of
  a prompt, where an answer is to come or to go on.
- "official_inference": everything between media is one piece, and no answer ends in EOS.
"""

import json
import re

from .prompt_mplug_owl2 import ANSWER_MARK, turn_ids, unmarked

IMAGE, VIDEO = "<image>", "<|video|>"
IMAGE_ID, VIDEO_ID = -1, -2  # of their rows
SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
TOKENIZATIONS = ("turns", "official_train", "official_inference")
_MEDIA = {IMAGE: IMAGE_ID, VIDEO: VIDEO_ID}
_ANSWER_LABEL, _QUESTION_LABEL = "AI: ", "\nHuman: "
# Every line begins with a newline but the first. `system` is the first line unless there is a
# system message; media that begin a question have lines of their own.
_TEMPLATE = """\
{%- macro media(part) -%}
    {%- if part['type'] == 'image' -%}
        {{- '<image>' -}}
    {%- elif part['type'] == 'video' and videos -%}
        {{- '<|video|>' -}}
    {%- elif not (part['type'] == 'text' and part['text'] is string) -%}
        {{- raise_exception("a part of a content must be of type 'image', or of type "
            ~ ("'video', or " if videos else "") ~ "'text' with a 'text'; found " ~ part) -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is iterable and content is not mapping and content -%}
        {%- for part in content -%}
            {{- media(part) or part['text'] -}}
        {%- endfor -%}
    {%- else -%}
        {{- raise_exception("a message must have a 'content': a text or a list of parts") -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro question(content) -%}
    {%- set whole = text(content) -%}
    {%- set state = namespace(text='', media=false) -%}
    {%- for part in content if content is not string and media(part) -%}
        {%- set state.media = true -%}
    {%- endfor -%}
    {%- if state.media -%}
        {%- for part in content -%}
            {%- if state.text -%}
                {%- set state.text = state.text + (media(part) or part['text']) -%}
            {%- elif media(part) -%}
                {{- 'Human: ' + media(part) + '\\n' -}}
            {%- else -%}
                {%- set state.text = part['text'].lstrip() -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- 'Human: ' + (state.text.rstrip() if state.media else whole) -}}
{%- endmacro -%}
{%- set state = namespace(newline='') -%}
{%- for message in messages -%}
    {%- if loop.first and system and message['role'] != 'system' -%}
        {{- system -}}
        {%- set state.newline = '\\n' -%}
    {%- endif -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {%- set given = text(message['content']) -%}
        {%- set line = given if given | trim else system -%}
    {%- elif message['role'] == 'system' -%}
        {{- raise_exception("a message of the role system must be the first") -}}
    {%- elif message['role'] == 'user' -%}
        {%- set line = question(message['content']) -%}
    {%- elif message['role'] == 'assistant' -%}
        {%- set line = 'AI: ' + text(message['content']) + (eos_token if ends_turns else '') -%}
    {%- else -%}
        {{- raise_exception("the 'role' of a message must be system, user or assistant; found "
            ~ message['role']) -}}
    {%- endif -%}
    {%- if line -%}
        {{- state.newline + line -}}
        {%- set state.newline = '\\n' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- state.newline + prompt_end -}}
{%- endif -%}"""


def default_chat_template(system: str, tokenization: str, videos: bool) -> str:
    """The Jinja template; `system` is the text before the first question, `videos` whether the
    model reads videos."""
    constants = {
        "system": system,
        "videos": videos,
        "ends_turns": tokenization != "official_inference",
        "prompt_end": "AI:" if tokenization == "turns" else _ANSWER_LABEL,
    }
    texts = {name: json.dumps(value) for name, value in constants.items()}
    return "".join(f"{{%- set {k} = {v} -%}}\n" for k, v in texts.items()) + _TEMPLATE


def prompt_ids(marked: str, tokenizer, tokenization: str, add_bos: bool = True) -> list[int]:
    """Ids of a prompt with marks, -1 for every image and -2 for every video; none of no text."""
    if not marked:
        return []
    ids = [tokenizer.bos_token_id] if add_bos else []
    if tokenization == "official_train":
        return ids + _training_ids(marked, tokenizer)
    for piece in _split(marked, *_MEDIA):
        if piece in _MEDIA:
            ids.append(_MEDIA[piece])
        elif tokenization == "turns":
            ids += turn_ids(piece, tokenizer)
        else:
            ids += tokenizer.text_ids(unmarked(piece))
    return ids


def _training_ids(marked: str, tokenizer) -> list[int]:
    """Ids by the rules of official training, which find the ends of answers by themselves."""
    eos = tokenizer.eos_token
    text = marked.replace(ANSWER_MARK, "").replace(eos, "")
    pieces = _split(text, *_MEDIA, _ANSWER_LABEL, _QUESTION_LABEL)
    if any(piece in _MEDIA for piece in pieces):  # only there an empty answer has no EOS
        pieces = [piece for piece in pieces if piece]
    ids, answers, before = [], False, ""
    for piece in pieces:
        answers = before == _ANSWER_LABEL and piece not in _MEDIA
        ids += [_MEDIA[piece]] if piece in _MEDIA else tokenizer.text_ids(unmarked(piece))
        ids += [tokenizer.eos_token_id] if answers else []
        before = piece
    return ids[:-1] if answers and not marked.endswith(eos) else ids


def _split(text: str, *separators: str) -> list[str]:
    """The pieces of a text, separators among them."""
    return re.split(f"({'|'.join(map(re.escape, separators))})", text)
