"""What can go wrong, one class for each thing that a program may want to do about it.

All errors are `KnnextError`, and each is also the error of Python's that it would be elsewhere, so
that `except ValueError`, `except OSError` and `except ImportError` go on to catch them. An argument
that no call can take is a plain ValueError or TypeError, as in torch. Every message is one sentence
that names what was given and what is wanted; the command `knnext` prints it and ends with exit
code 1.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

__all__ = [
    "CorpusError",
    "CorruptDatastoreError",
    "DatastoreError",
    "DatastoreFullError",
    "DatastoreLockedError",
    "DatastoreWriteError",
    "FormatVersionError",
    "IncompatibleDatastoreError",
    "IndexMismatchError",
    "KnnextError",
    "KnnextWarning",
    "MissingFileError",
    "MissingPackageError",
    "ModelError",
    "NoRoomError",
    "RankFailedError",
    "RankLostError",
    "UnfinishedDatastoreError",
]


class KnnextError(Exception):
    """Base of every error that knnext has a class of its own for."""


class KnnextWarning(UserWarning):
    """Base of what knnext warns of: ``warnings.simplefilter("ignore", KnnextWarning)`` hides it."""


class DatastoreError(KnnextError, ValueError):
    """A datastore cannot do what was asked. Base of every error below that names one."""


class CorruptDatastoreError(DatastoreError):
    """Files are missing, truncated or changed. ``problems`` names each of them."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[str, ...] = tuple(problems)


class FormatVersionError(DatastoreError):
    """Another program, or another format version, wrote these files."""


class IncompatibleDatastoreError(DatastoreError):
    """The datastore belongs to another model, layer, tokenizer or build than was asked for."""


class UnfinishedDatastoreError(DatastoreError):
    """The build has not ended: resume it, or open what it has committed."""


class DatastoreLockedError(DatastoreError):
    """Another process is writing to this datastore."""


class DatastoreWriteError(DatastoreError):
    """The disk refused a write. What was committed before is intact."""


class NoRoomError(KnnextError, OSError):
    """A disk has not the room for what is to be written. Its ``errno`` is ``ENOSPC``, or a quota's.

    It takes what an OSError takes: one message, or an errno, its words and a file name.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        if self.errno is None:
            self.errno = errno.ENOSPC


class DatastoreFullError(NoRoomError, DatastoreWriteError):
    """A disk has not the room for a datastore, or for what lies beside one."""


class IndexMismatchError(KnnextError, ValueError):
    """An index file is damaged, or belongs to another datastore, metric or request."""


class CorpusError(KnnextError, ValueError):
    """A corpus that cannot be found, read or divided; the message says what was wanted."""


class ModelError(KnnextError, ValueError):
    """A model that cannot be used: damaged, not whole, not causal, or with code of its own."""


class MissingFileError(KnnextError, FileNotFoundError):
    """A model, an adapter or an index is wanted where there is none, or lacks a file."""


class MissingPackageError(KnnextError, ImportError):
    """An optional package is not installed; the message says how to get it."""


class RankLostError(KnnextError, RuntimeError):
    """Another rank has gone or does not answer: nothing more can be done with the group."""


class RankFailedError(KnnextError, RuntimeError):
    """Another rank could not do its part, and says why; the group is ready for the next thing."""


#: What a disk says that has no room, or no more for this user.
FULL = (errno.ENOSPC, errno.EDQUOT)


def install(extra: str) -> str:
    """The words that install what an extra of pyproject.toml names: no registry has knnext yet."""
    return f'pip install ".[{extra}]" in the checkout of knnext'


def missing_package(what: str, package: str, extra: str) -> MissingPackageError:
    """``"plots need matplotlib: pip install ..."``, where ``what`` is such as ``"plots need"``."""
    return MissingPackageError(f"{what} {package}: {install(extra)}", name=package)
