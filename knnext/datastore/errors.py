"""What can go wrong with a datastore, one class per remedy."""

from __future__ import annotations

from collections.abc import Sequence


class DatastoreError(ValueError):
    """A datastore cannot do what was asked. Base of every error below."""


class CorruptDatastoreError(DatastoreError):
    """Files are missing, truncated or changed. ``problems`` names each of them."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


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
