"""LLaVA, ShareGPT and OpenAI conversations: [{id, image?, conversations: [{from, value}]}], or
[{messages: [{role, content}]}]."""

from data_prep.formats.common.conversation_files import ConversationFiles
from data_prep.formats.common.conversation_records import FIELDS
from data_prep.formats.format import Format


def _as_it_is(entry: dict) -> dict:
    return entry


FORMATS: tuple[Format, ...] = (ConversationFiles("conversations", FIELDS, _as_it_is),)
