"""Deleting documents: a list of what is not to be read any more, in ``meta.json`` itself.

One rename makes it hold, so there is no moment at which a half of it does. The rows stay in their
files until `compact` writes the datastore anew; no reader sees them meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnext.datastore.documents import DocumentTable, ids_and_names
from knnext.datastore.errors import DatastoreError
from knnext.datastore.files import WriterLock, replace_file
from knnext.datastore.kept import holds, joined
from knnext.datastore.meta import (
    BUILD_FILE,
    META_FILE,
    DatastoreMeta,
    DeletedMeta,
    creation_time,
)
from knnext.datastore.meta_file import read_finished, to_json


def delete(path: Path, documents: Sequence[int | str]) -> tuple[DatastoreMeta, int]:
    """Mark documents as deleted; what the datastore is then, and how many rows it lost.

    ValueError for a document that is not there and has never been; what was deleted before is
    passed over. DatastoreError where something is being written, or was left half-written.
    """
    with writing(path) as meta:
        ids = find(path, meta, documents)
        changed, rows = without(path, meta, ids)
        if changed is not meta:
            replace_file(path / META_FILE, to_json(changed))
    return changed, rows


@contextmanager
def writing(path: Path) -> Iterator[DatastoreMeta]:
    """Within, nobody else writes; gives what is finished there."""
    meta = read_finished(path)  # an error, before a lock is left in a folder that is none
    lock = WriterLock(path)
    try:
        meta = read_finished(path)
        if (path / BUILD_FILE).exists():
            raise DatastoreError(
                f"{path}: rows are being appended to it, and that has not ended: finish it first, "
                "with Datastore.create(..., resume=True)"
            )
        check_not_a_part(path, meta)
        yield meta
    finally:
        lock.release()


def check_not_a_part(path: Path, meta: DatastoreMeta) -> None:
    """DatastoreError of a part of a datastore that several processes build."""
    if "part" in (meta.origin or {}) and "parts" in (meta.origin or {}):
        raise DatastoreError(
            f"{path}: is a part of another datastore; change the whole, once it is joined"
        )


def find(
    path: Path, meta: DatastoreMeta, documents: Sequence[int | str], *, missing_ok: bool = False
) -> list[int]:
    """Ids of those that are there, ascending; every document of a name that is given."""
    ids, names = ids_and_names("documents", documents)
    if meta.documents is None:
        raise DatastoreError(f"{path}: was built without documents, by which rows are deleted")
    count = meta.documents.count
    if ids and not 0 <= min(ids) <= max(ids) < count:
        raise ValueError(f"documents must be ids from 0 to {count - 1}, got {min(ids)}, {max(ids)}")
    gone = _gone(path, meta, count)
    known = DocumentTable(path, meta).names if names else ()
    by_name = {d: one for d, one in enumerate(known) if one in names and not gone[d]}
    missing = names - set(by_name.values())
    if missing and not missing_ok:
        before = {digest for entry in meta.audit or () for digest in entry.get("names", ())}
        never = sorted(one for one in missing if name_digest(one) not in before)
        if never:
            more = f" and {len(never) - 1:,} more" if len(never) > 1 else ""
            raise ValueError(f"documents: {path} has none called {never[0]!r}{more}")
    return sorted(d for d in ids | set(by_name) if not gone[d])


def _gone(path: Path, meta: DatastoreMeta, count: int) -> NDArray[np.bool_]:
    """(count,) whether each document is deleted; of those that are compacted a place is left."""
    gone = holds(() if meta.deleted is None else meta.deleted.documents, count)
    if any(entry.get("what") == "compacted" for entry in meta.audit or ()):
        table = DocumentTable(path, meta)
        nameless = np.fromiter((not name for name in table.names), dtype=bool, count=count)
        gone |= nameless & (table.offsets.diff() == 0).numpy()
    return gone


def without(path: Path, meta: DatastoreMeta, ids: Sequence[int]) -> tuple[DatastoreMeta, int]:
    """The meta with the documents ``ids`` deleted, and their rows; itself where there are none."""
    if not ids:
        return meta, 0
    table = DocumentTable(path, meta)
    offsets = table.offsets.numpy()
    rows = [(int(offsets[d]), int(offsets[d + 1])) for d in ids]
    before = meta.deleted or DeletedMeta((), ())
    deleted = DeletedMeta(
        documents=joined([*before.documents, *((d, d + 1) for d in ids)]),
        rows=joined([*before.rows, *rows]),
    )
    # Rows that were appended to a document behind its deletion are counted once.
    lost = deleted.num_rows - before.num_rows
    names = table.names
    entry: dict[str, Any] = {
        "what": "deleted",
        "when": creation_time(),
        "documents": len(ids),
        "rows": lost,
        "names": [name_digest(names[d]) for d in ids],
    }
    return replace(meta, deleted=deleted, audit=(*(meta.audit or ()), entry)), lost


def name_digest(name: str) -> str:
    """16 hexadecimal digits by which who knows a document's name finds it in the audit."""
    content = name.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=8).hexdigest()
