"""How large a datastore will be, and whether its disk has the room: asked before the first row."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import torch

from knnext.datastore.errors import DatastoreError, DatastoreFullError
from knnext.datastore.meta import BUILD_FILE, META_FILE, VALUE_BYTES
from knnext.datastore.meta_file import read_meta
from knnext.say import binary_size


def row_bytes(dim: int, dtype: torch.dtype) -> int:
    """Bytes of one row: its key and its value."""
    return dim * dtype.itemsize + VALUE_BYTES


def check_room(path: str | Path, rows: int, bytes_of_row: int, also: str = "") -> None:
    """DatastoreFullError where the disk of ``path`` has not the room for ``rows`` rows.

    Rows that an earlier build left there are there already, and so are those of parts. ``also``:
    what the row's bytes hold beside key and value, for the message.
    """
    needed = max(0, rows - _committed(Path(path))) * bytes_of_row
    hint = "store fewer tokens or narrower keys, or choose another disk"
    check_disk(path, needed, f"the datastore{also}", hint)


def check_disk(path: str | Path, needed: int, what: str, hint: str) -> None:
    """DatastoreWriteError, with the hint, where the disk of ``path`` has not so many bytes free."""
    free = free_bytes(path)
    if needed > free:
        raise DatastoreFullError(
            f"{path}: {what} needs {binary_size(needed)} ({needed:,} bytes) and the disk has "
            f"{binary_size(free)} ({free:,} bytes) free; {hint}"
        )


def taken_bytes(folder: str | Path) -> int:
    """Of the disk, by the files in a folder; those of holes that nobody has written yet are not."""
    found = 0
    for file in Path(folder).glob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            state = file.stat()
            blocks = getattr(state, "st_blocks", None)
            found += state.st_size if blocks is None else min(state.st_size, 512 * blocks)
    return found


def free_bytes(path: str | Path) -> int:
    """Of the disk that ``path`` is on, or would be made on."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _committed(path: Path) -> int:
    for name in (BUILD_FILE, META_FILE):
        try:
            meta = read_meta(path, name)
            return meta.num_entries or sum(_written(path / p.folder) for p in meta.parts or ())
        except (OSError, DatastoreError):
            continue  # the build itself says what is wrong there
    return 0


def _written(part: Path) -> int:
    """Rows of a part that others may be writing now: what they have taken of the disk is gone."""
    return sum(file.stat().st_size for file in part.glob("values-*.bin")) // VALUE_BYTES
