"""Writing a datastore anew without its deleted rows, in its own folder.

The new files are a datastore of their own in a folder within, ``compact-00001`` and so on, until
one rename of ``meta.json`` makes them those of the whole. Then the old files go. Whatever a kill
leaves of either is removed by the next call.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from knnext.datastore.copy import copy_rows
from knnext.datastore.deletion import writing
from knnext.datastore.documents import START_BYTES
from knnext.datastore.errors import DatastoreError
from knnext.datastore.files import LOCK_FILE, replace_file, sync_directory
from knnext.datastore.meta import (
    BUILD_FILE,
    META_FILE,
    DatastoreMeta,
    FileMeta,
    ShardMeta,
    compact_folder,
    creation_time,
)
from knnext.datastore.meta_file import read_meta, to_json
from knnext.datastore.open_shard import remove_leftovers
from knnext.datastore.room import check_room, row_bytes
from knnext.datastore.verify import Progress


def compact(store: Any, progress: Progress | None = None) -> tuple[DatastoreMeta, int]:
    """What the datastore is then, and how many rows are gone from the disk."""
    path = store.path
    with writing(path) as meta:
        if to_json(meta) != to_json(store.meta):
            raise DatastoreError(f"{path}: has changed since it was opened: open it again")
        rows = 0 if meta.deleted is None else meta.deleted.num_rows
        if meta.deleted is not None:
            meta = _written(store, meta, progress)
            replace_file(path / META_FILE, to_json(meta))
        remove_old(path, meta)
    return meta, rows


def remove_old(path: Path, meta: DatastoreMeta) -> None:
    """Remove what an earlier state of the datastore left, or a compacting that did not end."""
    remove_leftovers(path, replace(meta, folder=None))
    kept = {meta.folder, *(part.folder for part in meta.parts or ())}
    for pattern in ("compact-*", "part-*"):
        for folder in path.glob(pattern):
            if folder.name not in kept and folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
    if meta.folder is not None:
        for name in (META_FILE, LOCK_FILE):  # of when it was a datastore of its own
            (path / meta.folder / name).unlink(missing_ok=True)
    sync_directory(path)


def _written(store: Any, meta: DatastoreMeta, progress: Progress | None) -> DatastoreMeta:
    """Write what is left into a new folder; gives the meta that makes it the datastore's."""
    number = int((meta.folder or "-0").rpartition("-")[2]) + 1
    folder = compact_folder(number)
    target_path = store.path / folder
    origin = {"compact_of": store.fingerprint}
    if not _is_begun(target_path, store.fingerprint):
        shutil.rmtree(target_path, ignore_errors=True)
    check_room(target_path, len(store), row_bytes(store.dim, store.dtype))
    facts = {"entries_per_shard": meta.entries_per_shard, "text": _without_hash(meta)}
    with store._create_like(target_path, origin, True, **facts) as target:
        writer = target._writing("compact")
        copy_rows(writer, store, progress)
        writer.begin_documents(_begun_documents(meta))  # what comes later is of none of them
    made: DatastoreMeta = target.meta
    entry = {"what": "compacted", "when": creation_time(), "rows": meta.num_entries - len(store)}
    changed = None if meta.origin is None else {**meta.origin, "compacted": number}
    documents = made.documents
    if documents is not None:
        hashes = None if documents.hashes is None else _moved(folder, documents.hashes)
        starts, names = _moved(folder, documents.starts), _moved(folder, documents.names)
        documents = replace(documents, starts=starts, names=names, hashes=hashes)
    return replace(
        made,
        created=meta.created,
        origin=changed,
        documents=documents,
        shards=tuple(
            ShardMeta(s.rows, _moved(folder, s.keys), _moved(folder, s.values)) for s in made.shards
        ),
        audit=(*(meta.audit or ()), entry),
        folder=folder,
    )


def _begun_documents(meta: DatastoreMeta) -> int:
    """How many have a place in the table: what is deleted has one from now on, if only by name."""
    if meta.documents is None or meta.deleted is None:
        return 0
    stops = [stop for _, stop in meta.deleted.documents]
    return max([meta.documents.starts.num_bytes // START_BYTES, *stops])


def _is_begun(path: Path, fingerprint: str) -> bool:
    """Whether a compacting of just this state has begun there, or was killed at its end."""
    for name in (BUILD_FILE, META_FILE):
        try:
            return (read_meta(path, name).origin or {}).get("compact_of") == fingerprint
        except (OSError, ValueError):
            continue
    return False


def _without_hash(meta: DatastoreMeta) -> dict[str, object] | None:
    """The text's facts: it is not that of all its documents any more."""
    return None if meta.text is None else {**meta.text, "documents": None}


def _moved(folder: str, file: FileMeta) -> FileMeta:
    return replace(file, file=f"{folder}/{file.file}")
