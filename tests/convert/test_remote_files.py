"""The files of code that exported directories carry."""

import ast
import json

import pytest
from paths import ROOT

from megatron_owl2.convert.remote_files import write_remote_code

SHARED = {
    "image_files.py",
    "image_processing_mplug_owl2.py",
    "image_resize.py",
    "pillow_images.py",
    "processing_mplug_owl2.py",
    "prompt_mplug_owl2.py",
    "text_options_mplug_owl2.py",
    "tokenization_mplug_owl2.py",
    "vision_mplug_owl2.py",
}
OWN = {
    "owl2": {"configuration_mplug_owl2.py", "decoder_mplug_owl2.py", "modeling_mplug_owl2.py"},
    "owl1": {
        "configuration_mplug_owl.py",
        "modeling_mplug_owl.py",
        "processing_mplug_owl.py",
        "prompt_mplug_owl.py",
        "vision_mplug_owl.py",
    },
}
SETTINGS = ("config", "preprocessor_config", "processor_config", "tokenizer_config")


@pytest.fixture(params=OWN)
def written(request, tmp_path):
    for name in SETTINGS:
        (tmp_path / f"{name}.json").write_text('{"kept": 1}')
    write_remote_code(tmp_path, request.param)
    return request.param, tmp_path


def test_a_directory_has_the_code_of_its_layout(written):
    layout, directory = written
    assert {path.name for path in directory.glob("*.py")} == SHARED | OWN[layout]
    assert not any(path.is_symlink() for path in directory.iterdir())
    folder = ROOT / "megatron_owl2/convert/remote_code"
    links = {path.name for path in (folder / "owl1").iterdir() if path.is_symlink()}
    assert links == SHARED and not any(
        (folder / "owl2" / name).is_symlink() for name in OWN["owl2"]
    )


def test_settings_name_classes_that_are_there(written):
    _, directory = written
    for name in SETTINGS:
        tree = json.loads((directory / f"{name}.json").read_text())
        assert tree["kept"] == 1
        for value in tree["auto_map"].values():
            module, _, wanted = (value if isinstance(value, str) else value[0]).partition(".")
            body = ast.parse((directory / f"{module}.py").read_text()).body
            assert wanted in {node.name for node in body if isinstance(node, ast.ClassDef)}


def test_modules_import_themselves_what_theirs_import(written):
    """transformers 5.4 copies what a named module imports, and not what those import."""
    _, directory = written
    imported = {}
    for path in directory.glob("*.py"):
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        imported[path.stem] = {node.module for node in nodes if node.level}
    named = [json.loads((directory / f"{n}.json").read_text())["auto_map"] for n in SETTINGS]
    values = [value for tree in named for value in tree.values()]
    modules = {(v if isinstance(v, str) else v[0]).partition(".")[0] for v in values}
    for module in modules:
        needed, found = set(), {module}
        while found - needed:
            needed |= found
            found = set().union(*(imported[name] for name in found))
        assert needed - {module} == imported[module], module


def test_no_settings_are_made(tmp_path):
    write_remote_code(tmp_path, "owl1")
    assert not list(tmp_path.glob("*.json"))
