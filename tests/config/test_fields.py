"""Ranges and choices that the schema declares are checked when files are read and before a run."""

import dataclasses
import math
from typing import Literal, get_args, get_origin

import pytest

from megatron_owl2.config.fields import Range, check_section
from megatron_owl2.config.fp8 import FP8, FP8_RECIPES
from megatron_owl2.config.load import load_config, merge
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.config.validate_parallel import validate_parallel
from megatron_owl2.errors import ConfigError
from megatron_owl2.utils.suggest import did_you_mean


def keys(section, prefix=""):
    """Dotted name, section and field of every key."""
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", section, entry


CONFIG = RunConfig()
KEYS = {name: (section, entry) for name, section, entry in keys(CONFIG)}
CHOICES = {name: get_args(e.type) for name, (_, e) in KEYS.items() if get_origin(e.type) is Literal}


def test_every_number_has_a_range_and_every_default_is_in_its_own():
    numbers = [name for name, (_, entry) in KEYS.items() if entry.type in (int, float)]
    assert len(numbers) > 50
    assert [name for name in numbers if "range" not in KEYS[name][1].metadata] == []
    check_section(CONFIG)


@pytest.mark.parametrize("name", [n for n, (_, e) in KEYS.items() if "range" in e.metadata])
def test_what_no_number_is_names_the_key(name):
    section, entry = KEYS[name]
    default = getattr(section, entry.name)
    for wrong in (-math.inf, math.nan, True, "1", None, [1.0]):
        setattr(section, entry.name, wrong)
        with pytest.raises(ConfigError) as refused:
            check_section(CONFIG)
        assert str(refused.value).startswith(f"{name} is {wrong!r}; it must be ")
        setattr(section, entry.name, default)


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_listed_wherever_a_wrong_one_comes_from(tmp_path, name):
    (tmp_path / "run.yaml").write_text("{}\n")
    for choice in CHOICES[name]:
        config = load_config(tmp_path / "run.yaml", [f"{name}={choice}"])
        check_section(config)
    *most, last = CHOICES[name]
    said = f"{name} is 'x'; use {', '.join(most)} or {last}"
    with pytest.raises(ConfigError, match=f"the command line: {said}"):
        load_config(tmp_path / "run.yaml", [f"{name}=x"])
    for wrong in ("null", "[x]", "{a: x}", "1"):
        with pytest.raises(ConfigError, match=name):
            load_config(tmp_path / "run.yaml", [f"{name}={wrong}"])
    section, entry = KEYS[name]
    default = getattr(section, entry.name)
    setattr(section, entry.name, "x")
    with pytest.raises(ConfigError, match=said):
        check_section(CONFIG)
    setattr(section, entry.name, default)


def test_a_choice_may_come_from_the_environment(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("parallel: {recompute: '${oc.env:CHOSEN}'}\n")
    monkeypatch.setenv("CHOSEN", "full")
    assert load_config(tmp_path / "run.yaml").parallel.recompute == "full"
    monkeypatch.setenv("CHOSEN", "most")
    with pytest.raises(ConfigError, match=r"'most'.*none.*\(key parallel.recompute\)"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("wrong", ["[value]", "[mlp_norm, mlp_norm]", "mlp_norm", "{a: b}"])
def test_lists_of_choices(tmp_path, wrong):
    (tmp_path / "run.yaml").write_text("{}\n")
    with pytest.raises(ConfigError, match="it may hold each of input_norm, key_value, mlp_norm"):
        load_config(tmp_path / "run.yaml", [f"model.decoder.modality_split={wrong}"])


def test_parallel_settings_are_checked_without_the_rest():
    config = RunConfig()
    config.parallel.recompute = "most"  # pyright: ignore[reportAttributeAccessIssue] # the test
    with pytest.raises(ConfigError, match="parallel.recompute is 'most'; use none, selective or"):
        validate_parallel(config, 64)


def test_the_choices_of_fp8_are_the_rows_of_the_table():
    assert get_args(FP8) == ("none", *FP8_RECIPES)
    rows = {name: (r.te_format, r.gemm_row_alignment) for name, r in FP8_RECIPES.items()}
    assert rows == {
        "tensorwise": ("hybrid", 16),
        "delayed": ("hybrid", 16),
        "blockwise": ("e4m3", 16),
        "mxfp8": ("e4m3", 32),
    }
    assert [r.gathered_row_alignment for r in FP8_RECIPES.values()] == [16, 16, 128, 32]
    overlapped = [r.overlapped_row_alignment for r in FP8_RECIPES.values()]
    assert overlapped == [16, 16, None, 128]


@pytest.mark.parametrize(
    ("limits", "whole", "inside", "outside", "words"),
    [
        (Range(at_least=0), True, [0, 10**30], [-1, 1.0], "at least 0"),
        (Range(1, 9), True, [1, 9], [0, 10, 10**400], "whole and from 1 to 9"),
        (Range(0, 1), False, [0, 1, 0.5], [-1e-9, 1.1], "from 0 to 1"),
        (Range(at_least=0), False, [0, 5e-324], [-5e-324, math.inf], "finite and not below 0"),
        (Range(positive=True), False, [1e-300, 1], [0, 5e-324, 10**400], "finite and above 0"),
        (Range(), False, [-1e308, 0], [math.inf, math.nan, 10**400], "finite"),
    ],
)
def test_ranges(limits, whole, inside, outside, words):
    assert all(limits.holds(value, whole=whole) for value in inside)
    assert not any(limits.holds(value, whole=whole) for value in [*outside, True, "1", None])
    assert limits.describe(whole=whole) == words


@dataclasses.dataclass
class _Inner:
    count: int


@dataclasses.dataclass
class _Outer:
    inner: dict[str, _Inner]


def test_any_schema_can_be_merged():
    found = merge(
        _Outer, [("a", {"inner": {"x": {"count": 1}}}), ("b", {"inner": {"x": {"count": 3}}})]
    )
    assert found == _Outer({"x": _Inner(3)})
    for tree, said in (
        ({"inner": {"x": {"cuont": 1}}}, "a: unknown key 'inner.x.cuont'; did you mean 'inner.x.c"),
        ({"inner": {"x": 3}}, "a: 'inner.x' is a section, not 3"),
        ({"inner": 3}, "a: 'inner' is a section, not 3"),
        ({"inner": {"x": {"count": 1.5}}}, r"a: .*1.5.* \(key inner.x.count\)"),
        ({"inner": {"x": {}}}, "'inner.x.count' is missing"),
    ):
        with pytest.raises(ConfigError, match=said):
            merge(_Outer, [("a", tree)])


def test_suggestions():
    assert did_you_mean("stps", ["steps", "seed"]) == "did you mean 'steps'?"
    assert did_you_mean("stps", ["steps"], "train.") == "did you mean 'train.steps'?"
    assert did_you_mean("zzz", ["steps", "seed"]) == "known: steps, seed"
