"""Loading of a run's configuration: YAML files with parents, dotted overrides, unknown keys.

`load_config` reads a YAML file (which may name a parent with `extends:`), applies overrides,
`section.key=value` or other YAML files, and refuses every key it does not know.
"""

import dataclasses
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_owl2.config.examples import locate
from megatron_owl2.config.schema import RunConfig, SourceConfig
from megatron_owl2.errors import ConfigError
from megatron_owl2.utils.suggest import did_you_mean


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a YAML file and overrides, in their order, into a RunConfig.

    An override is `section.key=value` or a YAML file. Raises ConfigError for a missing file, a key
    that does not exist (with the nearest one that does), a value of the wrong type, or an override
    that is neither. A file `examples/...` that is not there is the package's own example.
    """
    known = OmegaConf.structured(RunConfig)
    layers = _read_with_parents(Path(path))
    for override in overrides:
        if "=" in override:
            layers.append(("the command line", _parse(override)))
        elif override.endswith((".yaml", ".yml")):
            layers += _read_with_parents(Path(override))
        else:
            raise ConfigError(
                f"override {override!r} has no '='; write section.key=value, or name a .yaml file"
            )
    for where, layer in layers:
        _refuse_unknown(OmegaConf.to_container(layer), RunConfig, where)
        try:
            known = OmegaConf.merge(known, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"{where}: {str(error).splitlines()[0]} (key {error.full_key})"
            ) from None
    try:
        return OmegaConf.to_object(known)
    except OmegaConfBaseException as error:  # what ${...} refers to is looked for here
        raise ConfigError(f"{str(error).splitlines()[0]} (key {error.full_key})") from None


def to_dict(config: RunConfig) -> dict:
    """The resolved configuration as plain dicts and lists, ready for YAML."""
    return dataclasses.asdict(config)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def _parse(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(
            f"an override is not valid YAML: {' '.join(str(error).split())}"
        ) from None


def _read_with_parents(path: Path) -> list[tuple[str, DictConfig]]:
    """Name and content of `path` and all it extends, the oldest first; `extends` is relative to its
    file."""
    chain: list[tuple[Path, dict]] = []
    path = locate(path)
    while True:
        if not path.is_file():
            raise ConfigError(f"config file {path} does not exist")
        if any(path.resolve() == seen.resolve() for seen, _ in chain):
            raise ConfigError(f"{path} extends itself")
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} must hold sections with keys, not a {type(tree).__name__}")
        parent = tree.pop("extends", None)
        chain.append((path, tree))
        if parent is None:
            return [(str(path), OmegaConf.create(tree)) for path, tree in reversed(chain)]
        path = locate(parent, path.parent)


def _refuse_unknown(tree: dict, cls: type, where: str, prefix: str = "") -> None:
    names = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in tree.items():
        if key not in names:
            hint = did_you_mean(key, names, prefix)
            raise ConfigError(f"{where}: unknown key '{prefix}{key}'; {hint}")
        kind = names[key].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: '{prefix}{key}' is a section, not {value!r}")
            _refuse_unknown(value, kind, where, f"{prefix}{key}.")
        elif kind == list[SourceConfig]:
            if not isinstance(value, list):
                raise ConfigError(f"{where}: '{prefix}{key}' is a list, not {value!r}")
            for index, source in enumerate(value):
                name = f"{prefix}{key}[{index}]"
                if not isinstance(source, dict):
                    raise ConfigError(f"{where}: '{name}' is a section, not {source!r}")
                _refuse_unknown(source, SourceConfig, where, f"{name}.")
