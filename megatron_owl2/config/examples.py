"""Example configurations, which an installed package brings along."""

from pathlib import Path

_FOLDER = "examples"
_PACKAGED = Path(__file__).parents[1] / _FOLDER


def locate(path: str | Path, folder: str | Path = "") -> Path:
    """The file at `path`, relative to `folder`; one that does not exist and begins with `examples/`
    is looked for among the examples of the package.

    Returns where the file should be if it is in neither place.
    """
    found = Path(folder, path)
    first, *rest = Path(path).parts or ("",)
    if found.exists() or first != _FOLDER:
        return found
    packaged = _PACKAGED.joinpath(*rest)
    return packaged if packaged.is_file() else found
