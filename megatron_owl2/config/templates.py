"""Conversation templates by name: the text around questions, images and answers."""

from dataclasses import dataclass
from typing import Literal, get_args

TemplateName = Literal["owl2", "vicuna_v1", "owl1"]
Tokenization = Literal["turns", "official_train", "official_inference"]


@dataclass(frozen=True)
class Template:
    """Text of a conversation, `SYSTEM USER: question ASSISTANT: answer</s>USER: ...`.

    `system` comes before the first turn unless a record has a system text of its own; one space
    follows either. `user` comes before a question and `assistant` after it; `after_image` stands
    between the images that begin a question and its text.
    """

    name: TemplateName
    system: str = ""
    user: str = "USER: "
    assistant: str = " ASSISTANT:"
    after_image: str = ""


# Official inference has no system prompt; the released training script (version v1) has one, and a
# newline after the image. A model should be asked as it was trained.
TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("owl2"),
        Template("owl1"),
        Template(
            "vicuna_v1",
            system="A chat between a curious user and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers to the user's questions.",
            after_image="\n",
        ),
    )
}
assert TEMPLATES.keys() == set(get_args(TemplateName))
OWL2 = TEMPLATES["owl2"]
