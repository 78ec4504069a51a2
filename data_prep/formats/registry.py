"""Input formats by name: the `FORMATS` of all modules in this folder."""

from data_prep import formats
from data_prep.discovery import declared
from data_prep.formats.format import Format


def find_formats() -> dict[str, Format]:
    """Formats by name, sorted.

    Raises TypeError naming the module if it declares none or something else, or a name twice.
    """
    found: dict[str, Format] = {}
    for module, values in declared(formats, "FORMATS", without=("format", "registry")):
        for value in values:
            if not isinstance(value, Format):
                raise TypeError(f"{module}: {value!r} does not have name, plan and read")
            if value.name in found:
                raise TypeError(f"{module}: a format {value.name!r} exists already")
            found[value.name] = value
    return dict(sorted(found.items()))


FORMATS = find_formats()
