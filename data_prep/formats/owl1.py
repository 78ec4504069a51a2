"""Instructions of mPLUG-Owl: JSON lines {text, image?: [file, ...], task_type}.

`text` is a whole conversation in the model's template, a preamble and lines that begin with
"Human: " and "AI: "; an image is a line "Human: <image>", and its question the next Human line.
"""

import re

from data_prep.formats.common.conversation_files import ConversationFiles
from data_prep.formats.common.inputs import SkipError, shown
from data_prep.formats.format import Format

# The official code takes "AI: " for the beginning of an answer within a line too ("OpenAI: ").
_SPEAKER = re.compile(r"^(Human|AI):(?: |$)", re.MULTILINE)
_SPEAKERS = {"Human": "human", "AI": "gpt"}
_IMAGES = re.compile(r"(\s*<image>)+\s*")


def _as_conversation(entry: dict) -> dict:
    text, task = entry.get("text"), entry.get("task_type")
    if not isinstance(text, str):
        raise SkipError("no text", ", ".join(map(shown, entry)))
    if task is not None and not (isinstance(task, str) and task.endswith("_sft")):
        raise SkipError("task_type does not end in _sft", shown(task))
    preamble, *pieces = _SPEAKER.split(text)
    if not pieces:
        raise SkipError("no lines of Human: and AI:", shown(text))
    if "<image>" in preamble:
        raise SkipError("image tag before the first line of Human:", shown(text))
    messages: list[dict[str, str]] = []
    for speaker, said in zip(pieces[::2], pieces[1::2], strict=True):
        if speaker == "Human" and _continues(messages, said):
            messages[-1]["value"] += said
        else:
            messages.append({"from": _SPEAKERS[speaker], "value": said})
    return entry | {"conversations": messages, "system": preamble}


def _continues(messages: list[dict[str, str]], said: str) -> bool:
    """Whether a line of Human: belongs to the one before it: one of both is images alone."""
    if not messages or messages[-1]["from"] != "human":
        return False
    return any(_IMAGES.fullmatch(value) for value in (messages[-1]["value"], said))


FORMATS: tuple[Format, ...] = (ConversationFiles("owl1", ("text",), _as_conversation),)
