"""Files of a corpus: one search for all readers and tools, which names what it passes over.

A folder is searched with the folders in it, through links. Hidden files and folders, which other
systems leave beside the data, are never part of a corpus.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_owl2.utils.files import is_hidden

_EXAMPLES = 5  # kept for each reason
_LINES = 12  # of a summary


@dataclass(frozen=True)
class UnreadFile:
    """File or folder of a corpus that is not read, and the reason (a category, to be counted)."""

    path: Path
    reason: str


@dataclass(frozen=True)
class CorpusFiles:
    """Visible files of a corpus, sorted by path, and what was passed over."""

    files: Sequence[Path]
    unread: Sequence[UnreadFile] = field(default=())

    def select(
        self, wanted: Callable[[Path], bool], companions: Callable[[Path], bool] | None = None
    ) -> tuple[list[Path], list[UnreadFile]]:
        """Files that a reader wants, and all that is not read.

        An empty file is not read. `companions` are files of a format that hold no samples and need
        no mention.
        """
        taken, unread = [], list(self.unread)
        for path in self.files:
            if not wanted(path):
                if companions is None or not companions(path):
                    unread.append(UnreadFile(path, _unknown(path)))
            elif path.stat().st_size == 0:
                unread.append(UnreadFile(path, "empty file"))
            else:
                taken.append(path)
        return taken, sorted(unread, key=lambda entry: (entry.path, entry.reason))


def find_files(source: Path, output: Path | None = None) -> CorpusFiles:
    """Files of a corpus: `source` itself, or all that lie in this folder and the folders in it.

    Links to files and folders are followed; one to a folder above itself is not. `output`, a folder
    that is made of the corpus, is no part of it.
    """
    if not source.is_dir():
        return CorpusFiles([source])
    files: set[Path] = set()
    unread: list[UnreadFile] = []
    made = None if output is None else os.path.realpath(output)
    for found in _walk(source, (os.path.realpath(source),), made):
        if isinstance(found, UnreadFile):
            unread.append(found)
        else:
            files.add(found)
    once = _once(files)
    unread += [UnreadFile(path, "another name of a file that is read") for path in files - once]
    return CorpusFiles(sorted(once), sorted(unread, key=lambda entry: entry.path))


def _once(files: set[Path]) -> set[Path]:
    """Files without those that links name again."""
    real = {path: os.path.realpath(path) for path in files}
    by_link_last = sorted(files, key=lambda path: (os.path.abspath(path) != real[path], path))
    kept: dict[str, Path] = {}
    for path in by_link_last:
        kept.setdefault(real[path], path)
    return set(kept.values())


def count_unread(files: Sequence[UnreadFile]) -> dict[str, dict[str, Any]]:
    """Number (`files`) and `examples` of the files that are not read, by reason."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        entry = found.setdefault(file.reason, {"files": 0, "examples": []})
        entry["files"] += 1
        if entry["files"] <= _EXAMPLES:
            entry["examples"].append(str(file.path))
    return dict(sorted(found.items(), key=lambda item: (-item[1]["files"], item[0])))


def describe_unread(unread: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a summary about the files that are not read."""
    lines = [
        f"  not read: {entry['files']} x {reason} (such as {entry['examples'][0]})"
        for reason, entry in list(unread.items())[:_LINES]
    ]
    if others := list(unread.values())[_LINES:]:
        lines.append(f"  not read: {sum(entry['files'] for entry in others)} x other reasons")
    # A name may be what no terminal can print.
    return [line.encode(errors="backslashreplace").decode() for line in lines]


def why_unread(files: Sequence[UnreadFile]) -> str:
    """End of a message about a corpus in which there is nothing to read: what there is."""
    return "".join(f"\n{line}" for line in describe_unread(count_unread(files)))


def list_folder(folder: Path) -> tuple[list[Path], list[Path], list[UnreadFile]]:
    """Visible files and folders in a folder, each sorted by name, and what is passed over."""
    files, folders, unread = [], [], []
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = folder / entry.name
        if is_hidden(entry.name):
            reason = "hidden folder" if entry.is_dir() else "hidden file"
            unread.append(UnreadFile(path, reason))
        elif entry.is_dir():
            folders.append(path)
        elif entry.is_file():
            files.append(path)
        else:
            reason = "broken link" if entry.is_symlink() else "neither file nor folder"
            unread.append(UnreadFile(path, reason))
    return files, folders, unread


def _walk(folder: Path, above: tuple[str, ...], output: str | None) -> Iterator[Path | UnreadFile]:
    """Files in a folder and below, without those in `output`; `above` are the real paths of it and
    of those that led here."""
    try:
        files, folders, unread = list_folder(folder)
    except PermissionError:
        yield UnreadFile(folder, "folder that may not be entered")
        return
    yield from files
    yield from unread
    for path in folders:
        real = os.path.realpath(path)
        if real in above:
            yield UnreadFile(path, "link to a folder above it")
        elif real != output:
            yield from _walk(path, (*above, real), output)


def _unknown(path: Path) -> str:
    ending = re.sub(r"\d+", "N", path.suffix)  # as `split` numbers its files
    return f"extension {ending} is not read" if ending else "no extension"
