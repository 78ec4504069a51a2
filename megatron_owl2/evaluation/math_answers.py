r"""Answers to mathematical questions: where a text states one, and whether two are the same.

The rules are those of MATH (Hendrycks et al. 2021) with AGIEval's way of finding an answer: a
normal form of LaTeX is compared, nothing is calculated.
"""

import re

_AFTER = ("The answer is therefore", "答案是")
# In this order: a pattern and what it becomes.
_NORMAL_FORM = [
    (r"\n|\\!", ""),
    (r"\\\\", r"\\"),
    (r"[td]frac", "frac"),
    (r"\\left|\\right", ""),
    (r"\^\{\\circ\}|\^\\circ", ""),  # degrees
    (r"\\\$", ""),
    (r"\\text\{ .*", ""),  # units
    (r"\\%", ""),
    (r" \.", " 0."),
    (r"\{\.", "{0."),
    (r"^\.", "0."),
    (r"^[^=]{0,2}=([^=]*)$", r"\1"),  # a name such as "k ="
    (r"\\sqrt([^{])", r"\\sqrt{\1}"),
    (" ", ""),
    (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{])\{", r"\\frac{\1}{"),
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?[1-9]\d*|0)/(-?[1-9]\d*|0)$", r"\\frac{\1}{\2}"),
]


def is_same(answer: str, wanted: str) -> bool:
    r"""Whether two answers have one normal form, as 1/2, 0.5 and \frac12 do."""
    return _normal_form(answer) == _normal_form(wanted)


def stated_answer(text: str) -> str:
    r"""The answer in a text: what is in its last \boxed, else between the dollar signs of the last
    line with two, else after its last "=", else its last number; "" if there is none.

    What follows an "=" inside a box or dollar signs is the answer there.
    """
    for mark in _AFTER:
        text = text.rpartition(mark)[2].strip() if mark in text else text
    if "\\boxed" in text:
        return _after_equals(_boxed(text[text.rindex("\\boxed") + len("\\boxed") :]))
    in_dollars = re.findall(r"\$(.*)\$", text)
    if in_dollars and (found := _after_equals(in_dollars[-1])):
        return found
    if "=" in text:
        return text.rpartition("=")[2].lstrip(" ").rstrip(".").partition("\\n")[0]
    numbers = re.findall(r"\$?\d+(?:\.\d+)?(?!\w)", text)
    return numbers[-1] if numbers else ""


def _boxed(text: str) -> str:
    """The content of the braces that a text begins with; "" if they do not close."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:place]
    return ""


def _after_equals(answer: str) -> str:
    return answer.rpartition("=")[2].lstrip(" ") if "=" in answer else answer


def _normal_form(answer: str) -> str:
    for pattern, replacement in _NORMAL_FORM:
        answer = re.sub(pattern, replacement, answer)
    return answer
