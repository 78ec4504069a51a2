"""Baize (Xu et al., 2023) as published: quora_chat_data.json and others, [{topic, input}].

`input` is a whole dialogue: a line of Baize's own prompt, which goes, then questions behind
[|Human|] and answers behind [|AI|]. It ends in a [|Human|] with nothing behind.
"""

import re

from data_prep.formats.common.conversation_files import ConversationFiles
from data_prep.formats.common.inputs import SkipError, shown
from data_prep.formats.format import Format

_MARK = re.compile(r"\[\|(Human|AI)\|\]")
_SPEAKERS = {"Human": "human", "AI": "gpt"}


def _as_conversation(entry: dict) -> dict:
    text = entry.get("input")
    if not isinstance(text, str):
        raise SkipError("no input with a dialogue", ", ".join(map(shown, entry)))
    _, *pieces = _MARK.split(text)
    messages = [
        {"from": _SPEAKERS[mark], "value": said}
        for mark, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if not messages:
        raise SkipError("no [|Human|] and [|AI|]", shown(text))
    while messages and not messages[-1]["value"].strip():
        del messages[-1]  # where the next question or its answer would be
    return entry | {"conversations": messages}


FORMATS: tuple[Format, ...] = (ConversationFiles("baize", ("input",), _as_conversation),)
