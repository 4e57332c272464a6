"""Where a build begins, or goes on: the folder is locked, read and compared before any writing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from knnext.datastore.errors import DatastoreError
from knnext.datastore.files import LOCK_FILE, WriterLock, replace_file, sync_directory
from knnext.datastore.meta import (
    BUILD_FILE,
    META_FILE,
    DatastoreMeta,
    check_parameters,
    check_same_build,
)
from knnext.datastore.meta_file import not_joined, read_meta, to_json
from knnext.datastore.writer import DatastoreWriter


def open_writer(
    directory: Path,
    meta: DatastoreMeta,
    *,
    entries_per_shard: int | None,
    resume: bool,
    commit_seconds: float,
) -> DatastoreWriter:
    """Begin the build that ``meta`` (with no rows) describes, or go on with it.

    ``entries_per_shard`` None: as the build began, or as ``meta`` has it.
    """
    check_parameters(meta)
    directory.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(directory)
    try:
        state = read_state(directory)
        if state is None:
            check_empty(directory)
            replace_file(directory / BUILD_FILE, to_json(meta))
            sync_directory(directory.parent)
            state = meta
        elif not resume:
            raise DatastoreError(
                f"{directory}: holds a datastore already ({state.num_entries:,} entries). "
                "Pass resume=True to go on with it, or choose another path"
            )
        if entries_per_shard is None:
            meta = replace(meta, entries_per_shard=state.entries_per_shard)
        if state.parts is not None:
            raise DatastoreError(_in_parts(directory, state))
        check_same_build(meta, state, f"{directory}: cannot resume")
        return DatastoreWriter(directory, state, lock, commit_seconds)
    except BaseException:
        lock.release()
        raise


def read_state(directory: Path) -> DatastoreMeta | None:
    """The last commit: of a build, else of the finished datastore."""
    for name in (BUILD_FILE, META_FILE):
        try:
            return read_meta(directory, name)
        except FileNotFoundError:
            continue
    return None


def check_empty(directory: Path) -> None:
    # A build killed before its first commit leaves these two, and nothing else.
    own = {LOCK_FILE, f"{BUILD_FILE}.tmp"}
    foreign = sorted({path.name for path in directory.iterdir()} - own)
    if foreign:
        raise DatastoreError(
            f"{directory}: not empty (it holds {foreign[0]!r}) and not a datastore; "
            "choose a new or an empty folder"
        )


def _in_parts(directory: Path, state: DatastoreMeta) -> str:
    if (directory / BUILD_FILE).exists():
        return f"{not_joined(directory, state)}. It is not written to as a whole"
    return (
        f"{directory}: is joined from {len(state.parts or ())} parts, and nothing can be appended "
        "to it; Datastore.merge copies it together with other rows"
    )
