"""The files of a folder, and what is passed over in it and why.

Links to folders are followed, each folder once, wherever a circle of links leads. What lies in the
folder itself keeps its own name: links are looked at last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from knnext.corpus.documents import few

#: A folder below a corpus that holds all of one set is a datastore, a model, a demo or experiments:
#: results may be written beside the text, and are no text themselves.
_MADE = (
    {"keys-00000.bin", "values-00000.bin"},
    {"tokenizer.json", "config.json"},
    {"demo.json", "training.json"},
    {"cache", "report.html"},
)
_MADE_NAMES = ("knnext-demo", "knnext-experiments")


@dataclass
class Skipped:
    """Names of what was not read, by reason."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.found.setdefault(reason, []).append(name)

    def note(self, where: str) -> list[str]:
        """One line, or none where nothing was skipped."""
        if not self.found:
            return []
        parts = [f"{len(names):,} {why} ({few(names, 3)})" for why, names in self.found.items()]
        return [f"{where}: not read: {', '.join(parts)}"]


def files_below(folder: Path, root: Path, skipped: Skipped) -> list[tuple[str, Path]]:
    """(name in ``root``, path) of every file that is not hidden, sorted by the parts of the name.

    ``folder`` is ``root`` or lies in it.
    """
    seen: set[tuple[int, int]] = set()
    files: dict[tuple[str, ...], Path] = {}
    folders: list[Path] = [folder]
    links: list[Path] = []
    while folders or links:
        path = folders.pop() if folders else links.pop(0)
        name = path.relative_to(root)
        try:
            status = path.stat()
            is_folder = path.is_dir()
            known = (status.st_dev, status.st_ino) in seen
            if known and (is_folder or path.is_symlink()):
                continue  # a second way to what has been read
            seen.add((status.st_dev, status.st_ino))
            if is_folder:
                for entry in _entries(path, root, skipped, made=path != folder):
                    (links if entry.is_symlink() else folders).append(entry)
                links.sort()
            elif path.is_file():
                files[name.parts] = path
            else:
                skipped.add("no regular file", name.as_posix())
        except OSError as error:
            skipped.add("unreadable", f"{name.as_posix()}: {error.strerror}")
    return [("/".join(parts), files[parts]) for parts in sorted(files)]


def _entries(folder: Path, root: Path, skipped: Skipped, made: bool) -> Iterator[Path]:
    """What a folder holds, but for hidden entries; nothing where it is of our own making."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    if made and (folder.name in _MADE_NAMES or any(some <= set(names) for some in _MADE)):
        skipped.add("a datastore, a model or results", folder.relative_to(root).as_posix())
        return
    for name in names:
        if name.startswith("."):
            skipped.add("hidden", (folder / name).relative_to(root).as_posix())
        else:
            yield folder / name
