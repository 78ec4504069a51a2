"""Alpaca (Taori et al., 2023) as published: alpaca_data.json, [{instruction, input, output}].

The question is the instruction and, if there is one, the input in the line below. Alpaca's own
prompt ("Below is an instruction ...") stands around neither: the conversation template does.
"""

from data_prep.formats.common.conversation_files import ConversationFiles
from data_prep.formats.common.inputs import SkipError, shown
from data_prep.formats.format import Format
from megatron_owl2.data.shards.records import strip_text

_NO_INPUT = "<noinput>"  # of the model that wrote the instructions


def _as_conversation(entry: dict) -> dict:
    instruction, output = entry.get("instruction"), entry.get("output")
    if not isinstance(instruction, str) or not isinstance(output, str):
        raise SkipError("no instruction and output", ", ".join(map(shown, entry)))
    more = entry.get("input") or ""
    if not isinstance(more, str):
        raise SkipError("input is not a text", shown(more))
    more = strip_text(more)
    question = strip_text(instruction)
    if more and more.lower() != _NO_INPUT:
        question = f"{question}\n{more}"
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": output}]
    return entry | {"conversations": messages}


FORMATS: tuple[Format, ...] = (
    ConversationFiles("alpaca", ("instruction", "output"), _as_conversation),
)
