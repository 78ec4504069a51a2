"""Refusal of a configuration."""

from megatron_owl2.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message`, which names the key and the fix, unless it holds."""
    if not condition:
        raise ConfigError(message)
