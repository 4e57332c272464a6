"""Files that commands leave behind: looked at before the work begins, whole or absent after it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from knnext.errors import FULL, NoRoomError

_log = logging.getLogger(__name__)
_numbers = count()
_PART = re.compile(r"\.[0-9a-f]+-[0-9a-f]+\.part")


def check_writable(path: str | Path) -> Path:
    """The path, where a file could be put there now; so that hours of work do not end at it.

    Raises:
        OSError: the path is a folder, or its folder is missing or takes no files; names it.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a file is wanted, this is a folder", str(path))
    with whole_file(path, commit=False):
        pass
    return path


def check_outputs(*paths: str | Path | None, reads: Iterable[str | Path | None] = ()) -> None:
    """`check_writable` for each path that is given.

    Raises:
        ValueError: two of them are one file, or one is a file that is read.
    """
    seen = {Path(path).resolve(): path for path in reads if path}
    for path in paths:
        if not path:
            continue
        place = check_writable(path).resolve()
        if place in seen:
            raise ValueError(f"{path} would be written over {seen[place]}: give another file")
        seen[place] = path


@contextmanager
def whole_file(path: str | Path, *, commit: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to; at the end it is forced to disk and takes the name.

    After an exception nothing of it stays. An OSError that names no file is raised again with the
    name (NoRoomError of a full disk), and so is whatever else a library says where the disk is
    what is wrong.
    Without `commit` the file is made and removed. Whoever writes the same file at the same time
    has a part of its own, and the last one to end has the name. A link is written through. What
    killed processes left of the same file is removed.
    """
    place = Path(path)
    if place.exists() and not place.is_file() and not place.is_dir():
        raise OSError(errno.EINVAL, "not a regular file; nothing can take its place", str(path))
    path = place.resolve() if place.is_symlink() else place
    with _claimed(path, lambda part: part.open("xb").close()) as part:
        try:
            yield part
            if commit:
                _sync(part)
                part.replace(path)
                _sync(path.parent)
                _log.debug("wrote %s", path)
        except OSError as error:
            if error.filename not in (None, str(part)):
                raise
            reason = error.errno or _refusal(part) or errno.EIO
            raise _refused(reason, error.strerror or str(error), path) from error
        except Exception as error:
            # Libraries write in C++ and call a full disk anything: ask it.
            if part.exists() and (number := _refusal(part)):
                raise _refused(number, os.strerror(number), path) from error
            raise
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, of this call alone; removed at the end, if it is still there.

    Those that killed processes left beside the same `path` are removed before. OSError names
    `path` where none can be made.
    """
    with _claimed(path, Path.mkdir) as part:
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _claimed(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new name beside `path` for what `make` puts there, locked for as long as this lasts.

    The kernel drops the lock of a process that dies: what has none is removed first.
    """
    _remove_left(path)
    while True:
        part = path.with_name(f"{path.name}.{os.getpid():x}-{next(_numbers):x}.part")
        try:
            make(part)
        except FileExistsError:  # of a process with our number, in another container
            continue
        except OSError as error:
            raise _refused(error.errno or errno.EIO, error.strerror or "", path) from error
        lock = None
        with suppress(OSError):  # gone, see below; or a file system without locks
            lock = _opened(part)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if part.exists():
            break
        if lock is not None:  # another process took it for left, before it was locked
            os.close(lock)
    try:
        yield part
    finally:
        if lock is not None:
            os.close(lock)


def _remove_left(path: Path) -> None:
    """Remove what writers of `path` left that are dead: it is locked by nobody."""
    with suppress(OSError):
        for other in os.scandir(path.parent):
            name = other.name
            if not (name.startswith(path.name) and _PART.fullmatch(name[len(path.name) :])):
                continue
            with suppress(OSError):
                lock = _opened(Path(other.path))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if other.is_dir(follow_symlinks=False):
                        shutil.rmtree(other.path)
                    elif other.is_file(follow_symlinks=False):
                        Path(other.path).unlink()
                finally:
                    os.close(lock)


def _opened(path: Path) -> int:
    """A descriptor to lock, which must be one to write with on network file systems."""
    kept = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | kept)
    except IsADirectoryError:
        return os.open(path, os.O_RDONLY | kept)


def _refused(number: int, words: str, path: Path) -> OSError:
    return (NoRoomError if number in FULL else OSError)(number, words, str(path))


def _refusal(path: Path) -> int | None:
    """The errno with which the disk refuses to let a file grow; None where it does not."""
    try:
        with path.open("ab", buffering=0) as file:
            left = 1 << 16
            while left:  # what still fits is taken first
                left -= file.write(bytes(left))
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def write_text(path: str | Path, text: str, *, errors: str = "strict") -> None:
    """UTF-8, under its name when whole."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: str | Path, content: Any) -> None:
    """Indented JSON, under its name when whole."""
    # A lone surrogate, from a file name that is not UTF-8, becomes JSON's own escape of it.
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_text(path, text, errors="backslashreplace")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
