"""The errors of datastores, which `knnext.errors` holds among the others."""

from __future__ import annotations

from knnext.errors import (
    CorruptDatastoreError,
    DatastoreError,
    DatastoreFullError,
    DatastoreLockedError,
    DatastoreWriteError,
    FormatVersionError,
    IncompatibleDatastoreError,
    UnfinishedDatastoreError,
)

__all__ = [
    "CorruptDatastoreError",
    "DatastoreError",
    "DatastoreFullError",
    "DatastoreLockedError",
    "DatastoreWriteError",
    "FormatVersionError",
    "IncompatibleDatastoreError",
    "UnfinishedDatastoreError",
]
