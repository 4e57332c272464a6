"""Work that processes share: each takes what nobody has taken, until nothing is left.

A claim is a lock on a file (``flock``), which the kernel drops when its process dies: a stale claim
cannot be. Between machines it holds where the file system passes locks on: NFS since Linux 2.6.12,
GPFS, CephFS, Lustre mounted with ``flock``. Where it has none the work is refused; where each
machine keeps its own (Lustre's ``localflock``) nothing can tell, and no more is promised than that
a piece written twice gets the same bytes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from knnext.datastore.errors import DatastoreLockedError
from knnext.datastore.files import LOCK_FILE, WriterLock
from knnext.datastore.meta_file import ranges
from knnext.errors import KnnextWarning

#: Seconds between two looks at what others have claimed.
_LOOK_SECONDS = 0.5
#: Seconds after which a claimed piece that has not grown is said to hang: a batch of a large model
#: may take minutes, and a lock of a machine that is gone may be kept by its file server.
_SILENT_SECONDS = 1800.0

#: A state that changes while work goes on, such as sizes of files.
State = Callable[[int], object]


def take_all(
    numbers: Sequence[int],
    done: Callable[[int], bool],
    work: Callable[[int], object],
    state: State,
    what: str = "part",
) -> None:
    """Return when all ``numbers`` are done: here, or by other processes.

    ``work`` claims its piece, or raises DatastoreLockedError where another has. What a process
    that died had claimed is taken by whoever looks next. DatastoreLockedError where a claimed
    piece does not change for half an hour.
    """
    watch = _Watch(state)
    said = False
    while left := [number for number in numbers if not done(number)]:
        taken = [number for number in left if _take(number, done, work)]
        if not taken:
            left = [number for number in left if not done(number)]
            if left and not said:
                said = True
                warnings.warn(
                    f"waiting for {what} {ranges(left)}, of other processes",
                    KnnextWarning,
                    stacklevel=2,
                )
            watch.look(left, what)


def _take(number: int, done: Callable[[int], bool], work: Callable[[int], object]) -> bool:
    if done(number):  # a moment ago
        return True
    try:
        work(number)
    except DatastoreLockedError:
        return False
    return True


class _Watch:
    """Waits a little, and for no one that stands still."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._seen: dict[int, tuple[object, float]] = {}

    def look(self, numbers: Sequence[int], what: str) -> None:
        time.sleep(_LOOK_SECONDS)
        now = time.monotonic()
        self._seen = {
            number: (state, then if state == before else now)
            for number in numbers
            for before, then in [self._seen.get(number, (None, now))]
            for state in [self._state(number)]
        }
        silent = [n for n, (_, since) in self._seen.items() if now - since > _SILENT_SECONDS]
        if silent:
            raise DatastoreLockedError(
                f"{what} {ranges(silent)}: claimed by a process that has written nothing for "
                f"{_SILENT_SECONDS / 60:g} minutes; it hangs, or its machine is gone. End it, and "
                "run the same command again"
            )


def in_turn(count: int, rank: int, size: int) -> list[int]:
    """1 to ``count``, from where ``rank`` of ``size`` begins, so that few want the same one."""
    first = rank * count // max(1, size)
    return [(first + step) % count + 1 for step in range(count)]


@contextmanager
def when_free(directory: Path, name: str = LOCK_FILE, *, seconds: float = 600.0) -> Iterator[None]:
    """Within, the lock is held; DatastoreLockedError if it is not free within ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        try:
            lock = WriterLock(directory, name)
            break
        except DatastoreLockedError:
            if time.monotonic() > end:
                raise
            time.sleep(_LOOK_SECONDS / 10)
    try:
        yield
    finally:
        lock.release()


def check_locks(directory: Path) -> None:
    """DatastoreError where the file system has no locks."""
    with suppress(DatastoreLockedError):  # which shows that it has
        WriterLock(directory, needed=True).release()


def folder_state(folder: Path) -> object:
    """Names, sizes and times of the files in a folder."""
    try:
        files = [(file.name, file.stat()) for file in folder.iterdir()]
    except OSError:  # not there yet, or a file that was renamed meanwhile
        return None
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in files)
