"""Loading of configuration files: YAML with parents, dotted overrides, unknown keys.

`load_config` reads a YAML file (which may name a parent with `extends:`), applies overrides,
`section.key=value` or other YAML files, and refuses every key it does not know. `merge` does the
same for any schema of dataclasses.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf, read_write
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megatron_owl2.config.examples import locate
from megatron_owl2.config.fields import choice_misfit
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.errors import ConfigError
from megatron_owl2.utils.suggest import did_you_mean

T = TypeVar("T")
_COMMAND_LINE = "the command line"
_NOTHING = ("", "~", "null", "Null", "NULL")  # of YAML
_MARKS = ("'", '"', "!")  # of a text or a tag of YAML
Layer = tuple[str, dict]  # where keys and values come from, for messages, and their tree


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and overrides, in their order, into a RunConfig.

    An override is `section.key=value` or a YAML file. Raises ConfigError for a missing file, a key
    that does not exist (with the nearest one that does), a value of the wrong type, an override
    that is neither, or steps beside epochs, which replace them. A file `examples/...` that is not
    there is the package's own example.
    """
    layers = _read_with_parents(Path(path))
    for override in overrides:
        if "=" in override:
            layers.append((_COMMAND_LINE, _parse(override)))
        elif override.endswith((".yaml", ".yml")):
            layers += _read_with_parents(Path(override))
        else:
            raise ConfigError(
                f"override {override!r} has no '='; write section.key=value, or name a .yaml file"
            )
    config = merge(RunConfig, layers)
    steps = (tree.get("train", {}).get("steps") for where, tree in layers if where == _COMMAND_LINE)
    if config.train.epochs and any(steps):
        raise ConfigError(
            f"train.steps is given, but train.epochs is {config.train.epochs} and in its place; "
            "say train.epochs=0 too"
        )
    return config


def to_dict(config: RunConfig) -> dict:
    """The resolved configuration as plain dicts and lists, ready for YAML."""
    return dataclasses.asdict(config)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which takes the last of two values under one key; not this one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted(name for name in set(names) - {"<<"} if names.count(name) > 1):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The tree of a YAML file; raises ConfigError if it is not there or holds no sections."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        with path.open("rb") as file:
            tree = yaml.load(file, _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, for example
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        raise ConfigError(f"{path} is empty; it must hold sections with keys")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections with keys, not a {type(tree).__name__}")
    return tree


def merge(schema: type[T], layers: Sequence[Layer]) -> T:
    """An object of a dataclass with the values of `layers`, each overriding those before it.

    Names with values, such as stage.rates, add to those before; {} takes these away.
    Raises ConfigError for unknown and missing keys, and values of the wrong type or choice.
    """
    known: Any = OmegaConf.structured(schema)
    for where, tree in layers:
        _check_tree(tree, schema, where)
        for key in _emptied(tree, schema):
            parent, _, name = key.rpartition(".")
            section = OmegaConf.select(known, parent) if parent else known
            with read_write(section):  # of a frozen dataclass, as a recipe's
                section[name] = {}
        try:
            known = OmegaConf.unsafe_merge(known, OmegaConf.create(tree))  # copies nothing
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {_describe(error)}") from None
    try:
        return OmegaConf.to_object(known)  # pyright: ignore[reportReturnType] # of the schema
    except OmegaConfBaseException as error:  # a missing key, or what ${...} refers to
        raise ConfigError(_describe(error)) from None


def _emptied(tree: dict, schema: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of the keys for names with values to which a tree gives none."""
    for entry in dataclasses.fields(schema):
        value, kind = tree.get(entry.name), entry.type
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            yield from _emptied(value, kind, f"{prefix}{entry.name}.")
        elif get_origin(kind) is dict and value == {}:
            yield f"{prefix}{entry.name}"


def _describe(error: OmegaConfBaseException) -> str:
    if isinstance(error, MissingMandatoryValue):
        return f"'{error.full_key}' is missing"
    return f"{str(error).splitlines()[0]} (key {error.full_key})"


def _parse(override: str) -> dict:
    name, _, text = override.partition("=")
    text = text.strip()
    if _is_text(RunConfig, name) and text not in _NOTHING and not text.startswith(_MARKS):
        tree: Any = text  # as it is: YAML reads 2024_11_05 and 12:30 as numbers
        for key in reversed(name.split(".")):
            tree = {key: tree}
        return tree
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        return tree
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(
            f"an override is not valid YAML: {' '.join(str(error).split())}"
        ) from None


def _is_text(schema: Any, name: str) -> bool:
    """Whether the key of this dotted name holds any text."""
    key, _, rest = name.partition(".")
    types = {entry.name: entry.type for entry in dataclasses.fields(schema)}
    kind = types.get(key)
    if rest:
        return dataclasses.is_dataclass(kind) and _is_text(kind, rest)
    return kind in (str, str | None)


def _read_with_parents(path: Path) -> list[Layer]:
    """Name and tree of a file and of all it extends, the oldest first; `extends` is relative to its
    file."""
    chain: list[tuple[Path, dict]] = []
    path = locate(path)
    while True:
        if any(path.resolve() == seen.resolve() for seen, _ in chain):
            raise ConfigError(f"{path} extends itself")
        tree = read_yaml(path)
        parent = tree.pop("extends", None)
        chain.append((path, tree))
        if parent is None:
            return [(str(path), tree) for path, tree in reversed(chain)]
        path = locate(parent, path.parent)


def _check_tree(tree: dict, schema: Any, where: str, prefix: str = "") -> None:
    """Refuse keys that the schema does not have, sections that are none, and wrong choices."""
    types: dict[str, Any] = {entry.name: entry.type for entry in dataclasses.fields(schema)}
    for key, value in tree.items():
        if key not in types:
            hint = did_you_mean(key, types, prefix)
            raise ConfigError(f"{where}: unknown key '{prefix}{key}'; {hint}")
        _check_value(value, types[key], where, f"{prefix}{key}")


def _check_value(value: Any, kind: Any, where: str, name: str) -> None:
    """Refuse a value of the wrong choice or that is no section; OmegaConf tells other types."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: '{name}' is a section, not {value!r}")
        _check_tree(value, kind, where, f"{name}.")
    elif get_origin(kind) is list and dataclasses.is_dataclass(get_args(kind)[0]):
        if not isinstance(value, list):
            raise ConfigError(f"{where}: '{name}' is a list, not {value!r}")
        for index, item in enumerate(value):
            _check_value(item, get_args(kind)[0], where, f"{name}[{index}]")
    elif get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: '{name}' is a section, not {value!r}")
        if dataclasses.is_dataclass(get_args(kind)[1]):
            for key, item in value.items():
                _check_value(item, get_args(kind)[1], where, f"{name}.{key}")
    elif isinstance(value, str) and "${" in value:
        pass  # OmegaConf checks what it refers to
    elif wanted := choice_misfit(kind, value):
        raise ConfigError(f"{where}: {name} is {value!r}; {wanted}")
