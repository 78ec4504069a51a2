"""Generation as harnesses ask for it: their options in ours, and answers in their order."""

from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from megatron_owl2.errors import TaskError
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAME = ("min_new_tokens", "top_p", "top_k", "repetition_penalty", "length_penalty", "seed")
_OWN = {"num_beams": "beams", **{name: name for name in _SAME}}


def generation_options(given: Mapping[str, Any], max_new_tokens: int) -> GenerationOptions:
    """The options that a task's generation_kwargs mean, as lm-eval reads them.

    Greedy unless it samples with a temperature above 0; `max_new_tokens` is for tasks that name no
    length. Raises TaskError for an option that is not known here and for a value out of range.
    """
    left = {name: value for name, value in given.items() if value is not None}
    until = left.pop("until", [])
    lengths = [left.pop(name) for name in _LENGTHS if name in left]
    temperature = left.pop("temperature", 0.0)
    temperature = temperature if left.pop("do_sample", True) else 0.0
    own = {_OWN[name]: left.pop(name) for name in _OWN if name in left}
    if not temperature:  # tasks name what greedy decoding does not read, and that out of range
        own = {name: value for name, value in own.items() if name not in ("top_p", "top_k")}
    if left:
        raise TaskError(
            f"the task generates with {', '.join(map(repr, left))}, which this model has not; "
            "leave that out of its generation_kwargs"
        )
    try:
        return GenerationOptions(
            max_new_tokens=int(lengths[0]) if lengths else max_new_tokens,
            temperature=float(temperature),
            stop=[text for text in ([until] if isinstance(until, str) else until) if text],
            **own,
        )
    except (ValueError, TypeError) as error:
        raise TaskError(f"generation_kwargs of the task: {error}") from None


def texts_of(
    generator: Generator,
    requests: Iterable[Request],
    count: int,
    batch_size: int,
    positions: int,
    *,
    quiet: bool = False,
) -> list[str]:
    """The answers, stripped, to `count` requests in their order, `batch_size` of them together.

    `positions` is the longest prompt's with its answer.
    """
    found: dict[int, str] = {}
    with tqdm(total=count, desc="generating", disable=quiet) as bar:
        for place, completion in generator.as_they_end(requests, batch_size, positions):
            found[place] = completion.text
            bar.update()
    return [found[place] for place in range(count)]


def batch_size_of(value: str | int) -> int:
    """A harness's batch size; `auto` is 32. Raises TaskError if it is no number."""
    if str(value).startswith("auto"):
        return 32
    if not str(value).isdecimal() or not int(value):
        raise TaskError(f"batch_size is {value!r}; it must be a positive whole number or auto")
    return int(value)
