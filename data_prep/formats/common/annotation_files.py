"""JSON files of annotations: found by their published names, and read without what is not used."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import xxhash

from data_prep.formats.common.encodings import check_data
from data_prep.formats.common.inputs import shown
from megatron_owl2.errors import PreprocessError
from megatron_owl2.utils.json_text import parse_json

_NAMED = 5  # names of an object in a message


class Entries(list):
    """Pairs (name, value) of a JSON object, in the file's order; a name that comes twice is here
    twice."""


def published_file(source: Path, name: str) -> Path:
    """File that an input names: itself, or the one in this folder with the published `name`.

    Raises PreprocessError if the folder does not hold it, or if the input is neither.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise PreprocessError(
            f"{source} is neither a file nor a folder; name {name}, or the folder that holds it"
        )
    if not (source / name).is_file():
        raise PreprocessError(
            f"{source} holds no {name}; name the file itself if it has another name"
        )
    return source / name


def read_annotations(path: Path, fields: Collection[str]) -> tuple[Any, str]:
    """Content of a JSON file, and a digest of its bytes.

    Of an object that has some of `fields` these alone are kept, in a dictionary, while the file is
    read: such files hold up to a million entries, most of which is of no use here. Any other object
    is its Entries. Raises PreprocessError naming the file, and the place at which it is not JSON.
    """
    check_data(path)
    data = path.read_bytes()

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Entries:
        kept = {name: value for name, value in pairs if name in fields}
        return kept or Entries(pairs)

    try:
        return parse_json(data, make_object), xxhash.xxh3_128_hexdigest(data)
    except ValueError as error:
        raise PreprocessError(f"{path} is not JSON: {error}") from None


def unexpected(path: Path, expected: str, found: Any) -> PreprocessError:
    """Error about a file that is JSON but not what it must be."""
    if isinstance(found, dict | Entries):
        names = list(found) if isinstance(found, dict) else [name for name, _ in found]
        more = ", ..." if len(names) > _NAMED else ""
        what = f"an object with {', '.join(map(shown, names[:_NAMED]))}{more}"
        what = what if names else "an empty object"
    elif isinstance(found, list):
        what = f"a list of {len(found)} that begins with {shown(found[0])}" if found else "[]"
    else:
        what = shown(found)
    return PreprocessError(f"{path} must be {expected}; it holds {what}")
