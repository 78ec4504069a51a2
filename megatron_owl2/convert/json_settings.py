"""Settings of a JSON file, checked as they are taken: every refusal names file, key and value."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

from megatron_owl2.config.fields import choice_misfit
from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.config.validate_model import misfit, validate_model
from megatron_owl2.convert.safetensors_io import read_json
from megatron_owl2.errors import ConfigError, ConversionError


@dataclass(frozen=True)
class Settings:
    """An object of a JSON file, at `place` ("section.") unless it is the outermost.

    Every method raises ConversionError for what this model cannot have.
    """

    file: Path
    tree: dict
    place: str = ""

    @classmethod
    def read(cls, file: Path) -> "Settings":
        """The outermost object."""
        return cls(file, read_json(file))

    def section(self, key: str, wanted: str = "an object") -> "Settings":
        """The object under a key."""
        if not isinstance(self.tree.get(key), dict):
            self._refuse([(key, self.tree.get(key), f"wanted {wanted}")])
        return Settings(self.file, self.tree[key], f"{self.place}{key}.")

    def replaced(self, values: dict) -> "Settings":
        """The same object with other values."""
        return dataclasses.replace(self, tree=self.tree | values)

    def filled(self, defaults: dict) -> "Settings":
        """The same object with values for what is absent or null."""
        return self.replaced({k: v for k, v in defaults.items() if self.tree.get(k) is None})

    def pick(self, cls: type, fields: dict[str, str]):
        """cls with each of our fields from theirs, checked to be what a model can have."""
        found = {theirs: self.tree.get(theirs) for theirs in fields.values()}
        known = {f.name: f for f in dataclasses.fields(cls)}
        kinds: dict[str, Any] = {name: f.type for name, f in known.items()}
        self._refuse(
            (theirs, found[theirs], f"wanted {wanted}")
            for ours, theirs in fields.items()
            if (wanted := misfit(known[ours], found[theirs]))
        )
        for ours, theirs in fields.items():
            if choices := choice_misfit(kinds[ours], found[theirs]):
                self._refuse([(theirs, found[theirs], choices)])
        made = {n: str if get_origin(kind) is Literal else kind for n, kind in kinds.items()}
        return cls(**{ours: made[ours](found[theirs]) for ours, theirs in fields.items()})

    def hold(self, fixed: dict) -> None:
        """Refusal of what differs from what the model always is; absent settings are right."""
        self._refuse(
            (key, self.tree[key], f"this model only has {wanted!r}")
            for key, wanted in fixed.items()
            if self.tree.get(key, wanted) != wanted
        )

    def check(self, model: ModelConfig) -> None:
        """Refusal of sizes that are right one by one, but not together."""
        try:
            validate_model(model)
        except ConfigError as error:
            raise ConversionError(f"{self.file}: {error}") from None

    def _refuse(self, wrong: Iterable[tuple[str, object, str]]) -> None:
        """ConversionError if there are keys with values that are wrong."""
        listing = "; ".join(f"{self.place}{k} is {value!r}, {why}" for k, value, why in wrong)
        if listing:
            raise ConversionError(f"{self.file}: {listing}")
