"""Whether the files are still what ``meta.json`` says: sizes when opening, bytes when asked."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from knnext.datastore.errors import CorruptDatastoreError, DatastoreError
from knnext.datastore.files import check_file, file_checksum, parse_checksum
from knnext.datastore.meta import META_FILE, DatastoreMeta, FileMeta

Progress = Callable[[int, int], None]

_THREADS = 4  # checksums run outside the interpreter lock, and disks like several readers


def check_sizes(path: Path, meta: DatastoreMeta) -> None:
    """CorruptDatastoreError naming every file that is missing or too short."""
    problems: list[str] = []
    folders = [part.folder for part in meta.parts or ()]
    for folder in (path / name for name in (*folders, meta.folder) if name is not None):
        if folder.is_symlink():
            raise DatastoreError(
                f"{folder}: links out of the datastore's folder are not followed (move it there)"
            )
    for file in meta.files():
        try:
            check_file(path / file.file, file.num_bytes)
        except CorruptDatastoreError as error:
            problems += error.problems
    if problems:
        raise CorruptDatastoreError("; ".join(problems), problems)


def verify(path: Path, meta: DatastoreMeta, progress: Progress | None) -> None:
    """CorruptDatastoreError naming every file whose committed bytes have changed.

    ``progress(done, total)`` gets bytes, from one thread at a time.
    """
    files = meta.files()
    total = sum(file.num_bytes for file in files)
    done, lock = 0, Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda file: _problem(path, file, advance), files)
        problems = [problem for problem in found if problem is not None]
    if problems:
        listed = "; ".join(problems)
        message = f"{path}: {len(problems)} of {len(files)} files are damaged: {listed}"
        raise CorruptDatastoreError(message, problems)


def _problem(path: Path, file: FileMeta, advance: Callable[[int], None]) -> str | None:
    name = path / file.file
    try:
        check_file(name, file.num_bytes)
        crc = file_checksum(name, file.num_bytes, advance)
    except CorruptDatastoreError as error:
        return error.problems[0]
    except OSError as error:
        return f"{name}: {error.strerror}"
    if crc is None or crc != parse_checksum(file.checksum):
        return f"{name}: its content has changed (checksum differs from {META_FILE})"
    return None
