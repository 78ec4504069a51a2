"""How a check refuses: a ConfigError that names the key and the fix."""

import dataclasses
import functools
from collections.abc import Callable

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.errors import ConfigError


def one_of(config: RunConfig, key: str, *choices: str) -> None:
    """Refuse a value that is none of `choices`; raises ConfigError."""
    value = functools.reduce(getattr, key.split("."), config)
    most, last = ", ".join(choices[:-1]), choices[-1]
    require(value in choices, f"{key} is {value!r}; use {most} or {last}")


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_each(
    section: object,
    judge: Callable[[dataclasses.Field, object], str | None],
    prefix: str = "",
) -> None:
    """Hold every value of a section and of the sections in it against what it must be."""
    for entry in dataclasses.fields(section):
        value, name = getattr(section, entry.name), f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(value):
            check_each(value, judge, f"{name}.")
        elif wanted := judge(entry, value):
            raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
