"""Named prompts of a benchmark: as the model was trained, or to the byte as published code asks.

`owl2`, the default, follows the model's conversation template and ends directly after `ASSISTANT:`,
since models learn the answer's first token, which carries its own leading space, behind the colon.
`official` is the text of mPLUG-Owl2's evaluation scripts (X-PLUG/mPLUG-Owl, mplug_owl2/evaluate),
whose space after `ASSISTANT:` becomes a token; of its authors' adapter in VLMEvalKit for the
benchmarks of multiple choice that no script asks; and elsewhere LLaVA-1.5's request in the scripts'
frame. It has no system text, whatever the template of the model.
"""

from dataclasses import dataclass

from megatron_owl2.config.templates import Template

PROMPTS = ("owl2", "official")  # the default first
OFFICIAL_USER = "USER: "


@dataclass(frozen=True)
class OfficialPrompt:
    """What the official prompt has after a question: the request `suffix`, the benchmark's own if
    it is None, and the text `assistant` that leads to the answer."""

    suffix: str | None = None
    assistant: str = " ASSISTANT: "


# LLaVA-1.5 asks below the question, where mPLUG-Owl2's scripts ask on its line.
BELOW = OfficialPrompt("\nAnswer the question using a single word or phrase.")
_ADAPTER = " \nASSISTANT: "
# The adapter ends the last option with a line break of its own, and the request with a space.
ADAPTER_CHOICE = OfficialPrompt(
    "\n\nAnswer with the option’s letter from the given choices directly. ", _ADAPTER
)
ADAPTER_OPEN = OfficialPrompt("\nAnswer the question directly. ", _ADAPTER)


def settings_of(template: Template) -> dict[str, str]:
    """The name and the rules of a template among an evaluation's settings; `turns`, the default, is
    left out, so that results which are there stay finished."""
    rules = {} if template.tokenization == "turns" else {"tokenization": template.tokenization}
    return {"template": template.name, **rules}
