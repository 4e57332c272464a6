"""New rows in the place of documents: appended, and the old ones deleted, by one rename."""

from __future__ import annotations

from dataclasses import replace as changed_meta
from pathlib import Path
from typing import Any

from knnext.datastore.deletion import check_not_a_part, find, without
from knnext.datastore.documents import check_runs
from knnext.datastore.errors import DatastoreError
from knnext.datastore.files import WriterLock, sync_directory
from knnext.datastore.meta import BUILD_FILE, DatastoreMeta
from knnext.datastore.meta_file import read_finished
from knnext.datastore.open_shard import remove_leftovers
from knnext.datastore.resume import open_writer


def replace(path: Path, keys: Any, values: Any, documents: Any) -> tuple[DatastoreMeta, int]:
    """See `Datastore.replace`."""
    runs = check_runs(documents, len(values))
    meta = read_finished(path)
    if meta.documents is None:
        raise DatastoreError(f"{path}: was built without documents, by which rows are replaced")
    check_not_a_part(path, meta)
    if not runs:
        return meta, 0
    begun = (path / BUILD_FILE).exists()
    writer = open_writer(
        path,
        changed_meta(meta, num_entries=0, shards=(), documents=None, deleted=None, audit=None),
        entries_per_shard=None,
        resume=True,
        commit_seconds=float("inf"),
    )
    try:
        before = read_finished(path)  # with the lock: nobody changes it now
        if writer.num_entries == before.num_entries:
            writer.begin_anew()
        else:
            writer.check_begun_with(keys, values, runs, before.num_entries)
        writer.append(keys, values, runs, start=before.num_entries)
        ids = find(path, before, [name for name, _ in runs], missing_ok=True)
        after, lost = without(path, before, ids)
        writer.set_deleted(after)
        writer.finish()
    except BaseException:
        writer.abandon()
        if not begun:
            _take_back(path)
        raise
    return read_finished(path), lost


def _take_back(path: Path) -> None:
    """The extension did not come to its end: the datastore is what it was."""
    lock = WriterLock(path)
    try:
        (path / BUILD_FILE).unlink(missing_ok=True)
        remove_leftovers(path, read_finished(path))
        sync_directory(path)
    finally:
        lock.release()
