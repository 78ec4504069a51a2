"""Recipe of a mixture: its corpora, the number of samples and the filters of each."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.downloads.registry import CORPORA
from data_prep.formats.registry import FORMATS
from megatron_owl2.config.load import load_config, merge, read_yaml
from megatron_owl2.config.schema import RunConfig, SourceConfig
from megatron_owl2.config.templates import (
    OWL2,
    TemplateName,
    Tokenization,
    check_trainable,
    template_of,
)
from megatron_owl2.config.validate import check_groups
from megatron_owl2.errors import ConfigError, PreprocessError
from megatron_owl2.utils.suggest import did_you_mean

# Options of tools/prepare_downloads.py and tools/preprocess_data.py, with underscores.
_LIMITS = ("min_score", "max_score", "min_side", "max_aspect", "min_caption", "max_caption")
LIST_OPTIONS = (*_LIMITS, "only")
SHARD_OPTIONS = (*_LIMITS, "max_side", "jpeg_quality", "deduplicate")


@dataclass(frozen=True)
class Source:
    """Source of a mixture: `target` samples of a corpus.

    Either `corpus` is to be downloaded: its tables lie in `metadata`, `list` limits the rows, and
    the share `expected` of the addresses listed is thought to give a pair. Or the data are there
    already: `input` in `format`, with `images` if it names image files. `shards` limits the samples
    once more, by what was found. In training it is of `group`, one of data.groups, if these are
    used. Paths are relative to the mixture's folder.
    """

    target: int
    corpus: str | None = None
    metadata: str | None = None
    expected: float = 1.0
    list: dict[str, Any] = field(default_factory=dict)
    format: str = "img2dataset"
    input: str | None = None
    images: str | None = None
    shards: dict[str, Any] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Recipe:
    """Mixture of `sources` by name.

    `extends` is the configuration (relative to the recipe) that the one for training is made
    from, `config` holds keys of it that differ. The weights of the sources are their targets or,
    with "samples", their numbers of samples, so that an epoch has each once. `hold_out` samples of
    every source are for validation. Lengths of samples, which packing needs, are measured with a
    `tokenizer` (relative to the mixture's folder), the `template` and its `tokenization`. The rest
    are options of the tools.
    """

    sources: dict[str, Source]
    extends: str | None = None
    seed: int = 1234
    image_size: int = 320
    shard_size: int = 10_000
    config: dict[str, Any] = field(default_factory=dict)
    weights: Literal["targets", "samples"] = "targets"
    hold_out: int = 0
    tokenizer: str | None = None
    template: TemplateName = OWL2.name
    tokenization: Tokenization = OWL2.tokenization


def read_recipe(path: Path) -> Recipe:
    """Recipe of a YAML file; raises PreprocessError naming the key and what it must be."""
    try:
        tree = read_yaml(path)
        if isinstance(tree.get("sources"), dict):  # a name may look like a number
            tree["sources"] = {str(name): body for name, body in tree["sources"].items()}
        recipe = merge(Recipe, [(str(path), tree)])
        merge(RunConfig, [(f"{path}, config", recipe.config)])
    except ConfigError as error:
        raise _of_recipe(path, error) from None
    _require(len(recipe.sources) > 0, path, "sources", "a section of names with their sources")
    _require(recipe.hold_out >= 0, path, "hold_out", "0 or more")
    for name, source in recipe.sources.items():
        folder = name not in ("", "..") and Path(name).name == name
        _require(folder, path, f"the name {name!r} in sources", "the name of a folder")
        _check_options(path, f"sources.{name}.list.", source.list, LIST_OPTIONS)
        _check_options(path, f"sources.{name}.shards.", source.shards, SHARD_OPTIONS)
        _check_source(path, f"sources.{name}", source)
    try:
        config = _training_config(path, recipe)
        for name, source in recipe.sources.items():
            known = source.group in (config.data.groups or [""])
            groups = " or ".join(config.data.groups) or "absent without config.data.groups"
            _require(known, path, f"sources.{name}.group", f"one of config.data.groups: {groups}")
        check_groups(config)
        check_trainable(template_of(recipe.template, recipe.tokenization))
    except ConfigError as error:
        raise _of_recipe(path, error) from None
    return recipe


def _training_config(path: Path, recipe: Recipe) -> RunConfig:
    """The configuration for training as far as the recipe says it, the groups of its sources among
    it; raises ConfigError."""
    own = (f"{path}, config", recipe.config)
    layers = [own]
    if recipe.extends is not None:
        parent = path.parent / recipe.extends
        layers = [(str(parent), asdict(load_config(parent))), own]
    config = merge(RunConfig, layers)
    config.data.sources = [
        SourceConfig(path=name, group=source.group) for name, source in recipe.sources.items()
    ]
    return config


def _of_recipe(path: Path, error: ConfigError) -> PreprocessError:
    said = str(error)
    return PreprocessError(said if str(path) in said else f"{path}: {said}")


def _check_source(path: Path, where: str, source: Source) -> None:
    _require(source.target > 0, path, f"{where}.target", "above 0, whole")
    expected = "a share above 0 and up to 1"
    _require(0 < source.expected <= 1, path, f"{where}.expected", expected)
    _require(source.format in FORMATS, path, f"{where}.format", " or ".join(FORMATS))
    if source.corpus is None:
        _require(isinstance(source.input, str), path, f"{where}.input", "a path without a corpus")
        _require(not source.list, path, f"{where}.list", "absent where nothing is downloaded")
        return
    _require(source.corpus in CORPORA, path, f"{where}.corpus", " or ".join(CORPORA))
    _require(isinstance(source.metadata, str), path, f"{where}.metadata", "the path of its tables")
    for key, default in (("format", "img2dataset"), ("input", None), ("images", None)):
        given = getattr(source, key)
        _require(given == default, path, f"{where}.{key}", "absent for a corpus to download")


def _check_options(path: Path, prefix: str, options: dict, known: Collection[str]) -> None:
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known, prefix)
            raise PreprocessError(f"{path}: unknown key '{prefix}{key}'; {hint}")


def _require(condition: bool, path: Path, key: str, wanted: str) -> None:
    if not condition:
        raise PreprocessError(f"{path}: {key} must be {wanted}")
