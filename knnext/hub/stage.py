"""The folder beside a datastore's in which files arrive, of one process at a time."""

from __future__ import annotations

import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from knnext.datastore.files import LOCK_FILE, WriterLock
from knnext.datastore.meta import META_FILE, PARTIAL_FILE
from knnext.errors import DatastoreError, DatastoreLockedError, KnnextWarning

_LOOK_SECONDS = 0.5  # between two looks whether another process is done
_OF_ONE_ATTEMPT = re.compile(r"\.[0-9a-f]{8}\.incomplete$")


def check_place(path: Path) -> None:
    """DatastoreError for a folder whose place none can take: said before anything is fetched."""
    if not path.is_dir():
        return
    here = False
    with suppress(FileNotFoundError):  # of a folder that is gone
        here = path.samefile(Path.cwd())
    if here or os.path.ismount(path):
        what = "the folder that you are in" if here else "where a disk is mounted"
        raise DatastoreError(
            f"{path}: is {what}, and what is fetched takes a folder's place when it is whole; name "
            f"a folder within, such as {path / 'store'}"
        )


@contextmanager
def staged(stage: Path) -> Iterator[None]:
    """Within, files arrive in ``stage``, of this process alone; an error leaves them for later.

    Another process that fetches the same is waited for, and may have put it in its place.
    """
    stage.parent.mkdir(parents=True, exist_ok=True)
    if stage.is_symlink():
        raise DatastoreError(f"{stage}: is a link, nothing is fetched through it; remove it")
    lock = _claim(stage)
    try:
        for name in (META_FILE, PARTIAL_FILE):
            (stage / name).unlink(missing_ok=True)
        for left in stage.glob(".cache/**/*.incomplete"):
            if _OF_ONE_ATTEMPT.search(left.name):  # which was killed; nobody goes on with it
                left.unlink(missing_ok=True)
        yield
        if stage.exists():  # what came went elsewhere
            shutil.rmtree(stage, ignore_errors=True)
    finally:
        if stage.exists() and [file.name for file in stage.iterdir()] == [LOCK_FILE]:
            shutil.rmtree(stage, ignore_errors=True)  # nothing came
        lock.release()


def _claim(stage: Path) -> WriterLock:
    said = False
    while True:
        try:
            stage.mkdir(exist_ok=True)
        except FileExistsError:  # no folder, or one that took its place a moment ago
            if stage.exists() and not stage.is_dir():
                raise
            continue
        try:
            lock = WriterLock(stage)
        except FileNotFoundError:  # the folder took its place a moment ago
            continue
        except DatastoreLockedError:
            if not said:
                text = f"{stage}: another process is fetching into it, and is waited for"
                warnings.warn(text, KnnextWarning, stacklevel=5)
                said = True
            time.sleep(_LOOK_SECONDS)
            continue
        if lock.is_at(stage / LOCK_FILE):
            return lock
        lock.release()


def take_in(begun: Path, stage: Path) -> None:
    """Move what is there of a datastore to where the rest will come, also after a kill at it."""
    for file in [file for file in begun.rglob("*") if not file.is_dir()]:
        target = stage / file.relative_to(begun)
        if file.name not in (LOCK_FILE, PARTIAL_FILE) and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
    # Last goes what says that it is a part of a datastore.
    for left in [left for left in begun.iterdir() if left.name != PARTIAL_FILE]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    (begun / PARTIAL_FILE).unlink()
    begun.rmdir()
