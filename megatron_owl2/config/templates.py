"""Conversation templates by name: the text around questions, images and answers."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from megatron_owl2.config.require import require

TemplateName = Literal["owl2", "vicuna_v1", "owl1"]
Tokenization = Literal["turns", "official_train", "official_inference"]


@dataclass(frozen=True)
class Template:
    """Text of a conversation, `SYSTEM USER: question ASSISTANT: answer</s>USER: ...`, and the rules
    by which it is cut into pieces that are tokenised alone.

    `system` comes before the first turn unless a record has a system text of its own, and
    `after_system` after either. `user` comes before a question, behind `between_turns` if it is not
    the first, and `assistant` after it. Of the images that begin a question `after_image` follows
    the last and `between_images` the others.

    `tokenization` names the rules: `turns` cuts at images and before answers, and an answer ends in
    EOS; the official ones are those of the released training and inference code of mPLUG-Owl, where
    a space behind `assistant` is part of the text (data/released_tokenization.py). They are for
    templates with `official_rules` only, whose words they look for.
    """

    name: TemplateName
    system: str = ""
    user: str = "USER: "
    assistant: str = " ASSISTANT:"
    after_image: str = ""
    after_system: str = " "
    between_images: str = ""
    between_turns: str = ""
    official_rules: bool = False
    tokenization: Tokenization = "turns"

    @property
    def before_answer(self) -> str:
        """The text between a question and its answer."""
        return self.assistant if self.tokenization == "turns" else f"{self.assistant} "


# Official inference of mPLUG-Owl2 has no system prompt; its training script (version v1) has one,
# and a newline after the image. A model should be asked as it was trained. "owl1" is the text of
# the training data and the README of mPLUG-Owl; its interface has other words.
TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("owl2"),
        Template(
            "vicuna_v1",
            system="A chat between a curious user and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers to the user's questions.",
            after_image="\n",
        ),
        Template(
            "owl1",
            system="The following is a conversation between a curious human and AI assistant. The "
            "assistant gives helpful, detailed, and polite answers to the user's questions.",
            user="Human: ",
            assistant="\nAI:",
            after_image="\nHuman: ",
            after_system="\n",
            between_images="\nHuman: ",
            between_turns="\n",
            official_rules=True,
        ),
    )
}
assert TEMPLATES.keys() == set(get_args(TemplateName))
OWL2 = TEMPLATES["owl2"]


def template_of(name: str, tokenization: Tokenization = "turns") -> Template:
    """The template of this name under these rules; raises ConfigError if they do not fit it."""
    template = TEMPLATES[name]
    fitting = " or ".join(t.name for t in TEMPLATES.values() if t.official_rules)
    require(
        template.official_rules or tokenization == "turns",
        f"model.tokenization {tokenization} looks for the words of model.template {fitting}, which "
        f"{name} has not; use turns with {name}, or the template {fitting}",
    )
    return replace(template, tokenization=tokenization)


def check_trainable(template: Template) -> None:
    """Refuse rules by which no sample is made; raises ConfigError."""
    require(
        template.tokenization != "official_inference",
        "model.tokenization official_inference asks only, since it has no ends of answers; train "
        "with turns or official_train",
    )
