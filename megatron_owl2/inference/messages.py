"""Conversations to be continued: a question, or messages in the form of OpenAI and transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
from megatron_owl2.errors import InferenceError

Message: TypeAlias = Mapping[str, Any]  # role and content: a text, or parts of text and images


@dataclass
class Conversation:
    """A conversation up to a question: the texts between the images of each question, the answers
    to all but the last, and the images in order. Texts are text, whatever they spell."""

    questions: list[list[str]]
    answers: list[str] = field(default_factory=list)
    images: list = field(default_factory=list)
    system: str = ""


def from_question(question: str, images: Sequence) -> Conversation:
    """One question. With images, its placeholders are their places; without placeholders they come
    first. Without images a placeholder is text. Raises InferenceError if they differ in number."""
    if not images:
        return Conversation([[question]])
    pieces = question.split(IMAGE_PLACEHOLDER)
    if len(pieces) == 1:
        pieces = [*[""] * len(images), question]
    if len(pieces) - 1 != len(images):
        raise InferenceError(
            f"the prompt has {len(pieces) - 1} placeholders {IMAGE_PLACEHOLDER}, but "
            f"{len(images)} images; write one placeholder for each image"
        )
    return Conversation([pieces], images=list(images))


def from_messages(messages: Sequence[Message]) -> Conversation:
    """Messages of user and assistant in turn, the last one the user's; one of the system may come
    first.

    A content is a text or a list of parts, `{"type": "text", "text": ...}` or, in the user's,
    `{"type": "image", "image": ...}`. Raises InferenceError for anything else, and for a question
    or an answer that is empty.
    """
    conversation = Conversation([])
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise InferenceError(
                "a conversation is a list of messages with role and content, one of the list of "
                "prompts: generate([messages])"
            )
        role = message.get("role")
        pieces, images = _content(message, f"message {number}")
        if images and role != "user":
            raise InferenceError(f"message {number} has an image, which only the user may show")
        if role != "system" and not images and not pieces[0].strip():
            raise InferenceError(f"message {number} is empty")
        if role == "system" and number == 1:
            conversation.system = pieces[0]
        elif role == "user" and len(conversation.answers) == len(conversation.questions):
            conversation.questions.append(pieces)
            conversation.images += images
        elif role == "assistant" and len(conversation.answers) < len(conversation.questions):
            conversation.answers.append(pieces[0])
        else:
            raise InferenceError(
                f"message {number} has the role {role!r}; after a system message, if any, user and "
                "assistant take turns"
            )
    if len(conversation.questions) == len(conversation.answers):
        raise InferenceError("the last message must be the user's, which the model answers")
    return conversation


def check_texts(conversation: Conversation) -> None:
    """Refusal of texts that no UTF-8 has, and so no tokenizer; raises InferenceError."""
    questions = chain.from_iterable(conversation.questions)
    for text in (*questions, *conversation.answers, conversation.system):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InferenceError(
                f"a text holds {text[error.start]!r}, half of a character, which no UTF-8 has"
            ) from None


def _content(message: Message, where: str) -> tuple[list[str], list]:
    """The texts between the images of a message, and its images."""
    content = message.get("content")
    if isinstance(content, str):
        return [content], []
    pieces, images = [""], []
    for part in content if isinstance(content, list) and content else [None]:
        part = part if isinstance(part, Mapping) else {}
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            pieces[-1] += part["text"]
        elif kind == "image" and "image" in part:
            pieces.append("")
            images.append(part["image"])
        else:
            raise InferenceError(
                f"the content of {where} must be a text or a list of parts, of type 'text' with a "
                "'text' or of type 'image' with an 'image'"
            )
    return pieces, images
