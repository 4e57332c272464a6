"""A datastore that several processes build: its plan, its parts, and their joining.

The plan is the datastore's ``build.json`` with no rows, but with the parts and how many rows each
will have; whoever comes first writes it, and whoever comes later must agree with it. A part is a
datastore of its own, in a folder within; its ``.lock`` is the claim on it. When all are whole,
joining lists their files in ``meta.json`` and writes the documents of the whole: no row is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnext.datastore.claims import when_free
from knnext.datastore.documents import DocumentTable, DocumentWriter
from knnext.datastore.errors import (
    CorruptDatastoreError,
    DatastoreError,
    IncompatibleDatastoreError,
    UnfinishedDatastoreError,
)
from knnext.datastore.files import replace_file, sync_directory
from knnext.datastore.meta import (
    BUILD_FILE,
    META_FILE,
    DatastoreMeta,
    DocumentsMeta,
    FileMeta,
    Origin,
    PartMeta,
    ShardMeta,
    check_parameters,
    check_same_build,
    part_folder,
)
from knnext.datastore.meta_file import missing_parts, not_joined, read_finished, to_json
from knnext.datastore.open_shard import remove_leftovers
from knnext.datastore.resume import check_empty, read_state
from knnext.datastore.verify import check_sizes


def check_part(number: int, count: int) -> None:
    """ValueError unless there is a part ``number`` of ``count``, counted from 1."""
    if count < 1 or not 1 <= number <= count:
        hint = (
            f"; parts are counted from 1, so that task 0 of {count} makes part 1/{count}"
            if number == 0 and count >= 1
            else ""
        )
        raise ValueError(
            f"part: got {number}/{count}, want 1/{max(1, count)} to {max(1, count)}/{max(1, count)}"
            f"{hint}"
        )


def cut(ends: Sequence[int] | NDArray[np.int64], count: int) -> tuple[PartMeta, ...]:
    """``count`` parts of near-equal numbers of batches, which end at rows ``ends``.

    Where there are fewer batches than parts, some parts are empty.
    """
    bounds = [0, *(int(end) for end in ends)]
    batches = len(bounds) - 1
    places = [bounds[number * batches // count] for number in range(count + 1)]
    return tuple(
        PartMeta(part_folder(number), places[number] - places[number - 1])
        for number in range(1, count + 1)
    )


def first_rows(plan: DatastoreMeta) -> list[int]:
    """The row of the whole at which each part begins, and behind the last the number of rows."""
    rows = [part.rows for part in plan.parts or ()]
    return [0, *np.cumsum(rows, dtype=np.int64).tolist()]


def part_origin(plan: DatastoreMeta, number: int, first_document: int) -> Origin:
    """What a part says of where its rows come from."""
    return {
        **(plan.origin or {}),
        "part": number,
        "parts": len(plan.parts or ()),
        "first_row": first_rows(plan)[number - 1],
        "first_document": first_document,
    }


def read_plan(directory: Path) -> DatastoreMeta | None:
    """What was planned or joined in a folder, or None where that is not so."""
    try:
        found = read_state(directory)
    except (OSError, DatastoreError):
        return None
    return found if found is not None and found.parts is not None else None


def open_plan(
    directory: Path, meta: DatastoreMeta, ends: NDArray[np.int64], count: int, *, exactly: bool
) -> DatastoreMeta:
    """Begin the build in ``count`` parts that ``meta`` (with no rows) describes, or go on with it.

    Not ``exactly``: a build that was begun in another number of parts goes on in that. Gives the
    plan as it is in the folder, or the meta of what is finished there, also by one process.

    Raises:
        IncompatibleDatastoreError: another build was begun there; names what differs.
        DatastoreError: the folder holds something else, or the beginning of one process.
    """
    check_parameters(meta)
    found = read_state(directory) if directory.is_dir() else None
    if found is None:
        directory.mkdir(parents=True, exist_ok=True)
        with when_free(directory):
            found = read_state(directory)
            if found is None:
                check_empty(directory)
                found = replace(meta, parts=cut(ends, count))
                replace_file(directory / BUILD_FILE, to_json(found))
                sync_directory(directory.parent)
    where = f"{directory}: cannot go on with it"
    if found.parts is None and not (directory / BUILD_FILE).exists():
        check_same_build(replace(meta, entries_per_shard=found.entries_per_shard), found, where)
        return found
    if found.parts is None:
        raise DatastoreError(
            f"{directory}: one process has begun a datastore there; go on so (without --part, "
            "--parts and torchrun), or choose another folder for parts"
        )
    check_same_build(replace(meta, entries_per_shard=found.entries_per_shard), found, where)
    if exactly and len(found.parts) != count:
        raise IncompatibleDatastoreError(
            f"{where}: parts: datastore has {len(found.parts)}, asked for {count}"
        )
    if found.parts != cut(ends, len(found.parts)):
        raise IncompatibleDatastoreError(f"{where}: its parts were cut at other rows")
    return found


def join(directory: Path) -> None:
    """Make one datastore of the parts in ``directory``; one that is joined stays as it is.

    Raises:
        UnfinishedDatastoreError: parts are missing; names them, and the command that makes them.
        IncompatibleDatastoreError, CorruptDatastoreError: a part is of another build, or damaged.
        DatastoreError: nothing in the folder was built in parts.
    """
    found = _planned(directory)
    if found is None:
        return
    if missing_parts(directory, found):
        raise UnfinishedDatastoreError(not_joined(directory, found))
    with when_free(directory):
        found = _planned(directory)
        if found is not None:
            _join(directory, found)


def _planned(directory: Path) -> DatastoreMeta | None:
    """The plan, or None where it has been joined."""
    found = read_state(directory) if directory.is_dir() else None
    if found is None or found.parts is None:
        if found is None:
            read_finished(directory)  # says what is wrong
        raise DatastoreError(f"{directory}: was built by one process, there is nothing to join")
    return found if (directory / BUILD_FILE).exists() else None


def _join(directory: Path, plan: DatastoreMeta) -> None:
    remove_leftovers(directory, plan)  # of a joining that was killed
    parts = [_read_part(directory, plan, n) for n in range(1, len(plan.parts or ()) + 1)]
    shards = [
        _within(part.folder, shard)
        for part, meta in zip(plan.parts or (), parts, strict=True)
        for shard in meta.shards
    ]
    joined = replace(
        plan,
        num_entries=sum(meta.num_entries for meta in parts),
        shards=tuple(shards),
        documents=_join_documents(directory, plan, parts),
    )
    replace_file(directory / BUILD_FILE, to_json(joined))
    (directory / BUILD_FILE).replace(directory / META_FILE)
    sync_directory(directory)


def _read_part(directory: Path, plan: DatastoreMeta, number: int) -> DatastoreMeta:
    """A finished part's meta; an error where it is not the one that was planned."""
    assert plan.parts is not None
    part = plan.parts[number - 1]
    folder = directory / part.folder
    meta = read_finished(folder)
    first = int((meta.origin or {}).get("first_document", 0))
    wanted = replace(plan, origin=part_origin(plan, number, first))
    where = f"{folder}: is not part {number} of {len(plan.parts)} of this datastore"
    check_same_build(wanted, meta, where)
    if meta.num_entries != part.rows:
        raise IncompatibleDatastoreError(
            f"{where}: it has {meta.num_entries:,} rows, want {part.rows:,}"
        )
    check_sizes(folder, meta)
    return meta


def _within(folder: str, shard: ShardMeta) -> ShardMeta:
    def moved(file: FileMeta) -> FileMeta:
        return replace(file, file=f"{folder}/{file.file}")

    return ShardMeta(shard.rows, moved(shard.keys), moved(shard.values))


def _join_documents(
    directory: Path, plan: DatastoreMeta, parts: list[DatastoreMeta]
) -> DocumentsMeta | None:
    """Write the table of all documents: the bytes that one process would have written.

    A document may go on in the next part, which then names it again.
    """
    firsts = first_rows(plan)
    names: list[str] = []
    hashes: list[bytes] = []
    used: list[int] = []
    starts: list[int] = []
    known: set[bool] = set()
    for number, meta in enumerate(parts, start=1):
        if not meta.num_entries or meta.documents is None:
            known |= {False} if meta.num_entries else set()
            continue
        folder = directory / part_folder(number)
        table = DocumentTable(folder, meta)
        base = int((meta.origin or {}).get("first_document", 0))
        _check_follows(folder, names, base, table.names)
        own = [b"" for _ in table.names] if table.hashes is None else [*map(bytes, table.hashes)]
        known.add(True)
        hashes[base:], names[base:] = own, table.names
        offsets = table.offsets.numpy()
        begun = np.flatnonzero(np.diff(offsets) > 0)
        fresh = begun[base + begun > (used[-1] if used else -1)]
        used += (base + fresh).tolist()
        starts += (firsts[number - 1] + offsets[fresh]).tolist()
    if known == {False, True}:
        raise IncompatibleDatastoreError(f"{directory}: some of its parts keep documents, not all")
    if not used:
        return None
    hashed = any(hashes)
    writer = DocumentWriter(directory, None, hashed=hashed)
    try:
        blank = bytes(len(next(filter(None, hashes), b"")))
        writer.plan(names, b"".join(one or blank for one in hashes) if hashed else None)
        writer.begin(np.asarray(used, dtype=np.int64), np.asarray(starts, dtype=np.int64))
        writer.end()
        writer.sync()
        return writer.meta()
    finally:
        writer.close()


def _check_follows(folder: Path, names: list[str], base: int, own: Sequence[str]) -> None:
    """A part's documents begin with the one after the last so far, or go on with that."""
    if base == len(names) or (base == len(names) - 1 and list(own[:1]) == names[base:]):
        return
    raise CorruptDatastoreError(
        f"{folder}: its documents begin with document {base}, where those before it end with "
        f"{len(names) - 1}"
    )
