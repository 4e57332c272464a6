"""The few file operations a datastore rests on: grow, sync, replace, lock, map.

Everything that must survive a kill goes through here, so that the promise can be read in one
place: files only grow, a crash leaves at most bytes past the committed length, and a reader never
looks past the committed length.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from knnext.datastore.errors import (
    CorruptDatastoreError,
    DatastoreError,
    DatastoreLockedError,
)
from knnext.errors import KnnextWarning

BLOCK_BYTES = 4 << 20
LOCK_FILE = ".lock"

# A private mapping may be written to, so Linux counts it against memory and refuses one larger
# than RAM. Nothing is ever written, hence no reservation. Python names the flag from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CHECKSUM = re.compile(r"crc32:[0-9a-f]{8}")


def format_checksum(crc: int) -> str:
    """``crc32:xxxxxxxx``. The prefix leaves room for another algorithm in a later format."""
    return f"crc32:{crc:08x}"


def parse_checksum(text: str) -> int:
    """Inverse of :func:`format_checksum`; DatastoreError for anything else."""
    if not _CHECKSUM.fullmatch(text):
        raise DatastoreError(f"checksum: got {text!r}, want 'crc32:' and 8 hexadecimal digits")
    return int(text[6:], 16)


def inside(directory: Path, name: str) -> Path:
    """Path of the file ``name`` in ``directory``; DatastoreError if it could lead elsewhere."""
    if not _PLAIN_NAME.fullmatch(name):
        raise DatastoreError(
            f"{directory}: file name {name!r} in the metadata is not a plain name; "
            "a datastore reads only files of its own folder"
        )
    return directory / name


def check_file(path: Path, nbytes: int) -> None:
    """Raise CorruptDatastoreError unless ``path`` is a regular file of at least ``nbytes``.

    Of one that compacting has removed since the datastore was opened, a DatastoreError says so.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        _check_compacted(path)
        raise CorruptDatastoreError(f"{path}: the file is missing", [f"{path}: missing"]) from None
    if not stat.S_ISREG(status.st_mode):
        raise DatastoreError(
            f"{path}: not a regular file; links out of the datastore's folder are not followed "
            "(copy or hard-link the file into the folder)"
        )
    if status.st_size < nbytes:
        problem = f"truncated: {status.st_size:,} bytes, want {nbytes:,}"
        raise CorruptDatastoreError(f"{path}: {problem}", [f"{path}: {problem}"])


def _check_compacted(path: Path) -> None:
    """DatastoreError where the datastore does not name the file ``path`` any more."""
    for folder in path.parents[:2]:  # of a shard in a folder within, that of the whole
        try:
            named = (folder / "meta.json").read_bytes()
        except OSError:
            continue
        if f'"{path.relative_to(folder).as_posix()}"'.encode() not in named:
            raise DatastoreError(
                f"{path}: the file is gone, as {folder} was compacted or written anew since it was "
                "opened: open it again"
            )
        return


def map_file(path: Path, nbytes: int) -> mmap.mmap:
    """Map the first ``nbytes`` (> 0) of ``path``, copy-on-write: the file cannot be changed.

    Writable memory keeps torch from warning, a private mapping keeps writes out of the file.
    """
    check_file(path, nbytes)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mmap.mmap(
            fd,
            nbytes,
            flags=mmap.MAP_PRIVATE | _NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    finally:
        os.close(fd)


def file_checksum(
    path: Path, nbytes: int, advance: Callable[[int], None] | None = None
) -> int | None:
    """CRC-32 of the first ``nbytes``, or None if there are fewer. ``advance`` gets block sizes."""
    crc, left = 0, nbytes
    block = bytearray(min(BLOCK_BYTES, max(nbytes, 1)))
    view = memoryview(block)
    # Reads rather than a mapping: a bad sector is then an OSError, not a SIGBUS.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0) as file:
        while left:
            got = file.readinto(view[: min(left, len(block))])
            if not got:
                return None
            crc = zlib.crc32(view[:got], crc)
            left -= got
            if advance is not None:
                advance(got)
    return crc


class AppendFile:
    """A file that only grows, with the CRC-32 of what it holds.

    ``length`` is what the owner believes in; bytes past it are leftovers of a crash and are cut.
    """

    def __init__(self, path: Path, length: int = 0, crc: int = 0) -> None:
        self.path = path
        self.length, self.crc = length, crc
        self._dirty = True  # whoever had it open before may have failed to sync it
        if length:
            check_file(path, length)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        # A file object, so that a writer that is merely dropped still closes its descriptors.
        self._file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        self.truncate(length, crc)

    @property
    def checksum(self) -> str:
        return format_checksum(self.crc)

    def append(self, data: memoryview) -> None:
        """Write ``data`` at the end. On OSError the tail is undefined: truncate() to recover."""
        self._dirty = True
        for begin in range(0, len(data), BLOCK_BYTES):
            block = data[begin : begin + BLOCK_BYTES]
            self.crc = zlib.crc32(block, self.crc)
            while len(block):
                written = os.pwrite(self._file.fileno(), block, self.length)
                self.length += written
                block = block[written:]

    def truncate(self, length: int, crc: int) -> None:
        """Go back to an earlier ``length`` whose checksum was ``crc``."""
        if os.fstat(self._file.fileno()).st_size != length:
            self._dirty = True
            os.ftruncate(self._file.fileno(), length)
        self.length, self.crc = length, crc

    def sync(self) -> None:
        """Return once the content is on the disk."""
        if self._dirty:
            os.fsync(self._file.fileno())
            self._dirty = False

    def close(self) -> None:
        self._file.close()


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``: after a crash the file holds all of the old or of the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    file = AppendFile(temporary)
    try:
        file.append(memoryview(content))
        file.sync()
    finally:
        file.close()
    temporary.replace(path)
    sync_directory(path.parent)


class WriterLock:
    """Exclusive advisory lock on a datastore; the kernel drops it when the process dies.

    ``name`` is the file that is locked. Where the file system has no locks there is a warning, and
    with ``needed`` a DatastoreError.
    """

    def __init__(self, directory: Path, name: str = LOCK_FILE, *, needed: bool = False) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(directory / name, flags, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.release()
                raise DatastoreLockedError(
                    f"{directory}: another process is writing to this datastore; "
                    "wait for it, or end it and resume"
                ) from None
            if needed:
                self.release()
                raise DatastoreError(
                    f"{directory}: its file system has no locks ({error}), by which processes "
                    "could share the parts between them; give each its own, as --part 3/64"
                ) from None
            # Some network file systems have no locks; a build there is still worth having.
            text = f"{directory}: no lock against a second writer ({error})"
            warnings.warn(text, KnnextWarning, stacklevel=4)

    def is_at(self, path: Path) -> bool:
        """Whether the locked file is the one there, and its folder was not moved meanwhile."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), path.lstat())
        return False

    def release(self) -> None:
        # The file stays: removing it would let two writers lock two different files.
        self._file.close()
