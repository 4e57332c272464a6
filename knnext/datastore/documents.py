"""Which rows belong to which document: the stored table, and its growth during a build.

Document ``d`` owns rows ``offsets[d]`` to ``offsets[d + 1]``. On disk only the first rows are
kept, because those never change once written: the table grows by appending, like the shards.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.datastore.errors import CorruptDatastoreError
from knnext.datastore.files import AppendFile, check_file, map_file, parse_checksum
from knnext.datastore.kept import holds
from knnext.datastore.meta import (
    HASH_BYTES,
    HASHES_FILE,
    NAMES_FILE,
    STARTS_FILE,
    DatastoreMeta,
    DocumentsMeta,
    FileMeta,
)

# Ids that nobody used become empty documents; a hash taken for an id would make billions.
_MAX_EMPTY = 1 << 24
START_BYTES = 8

Int64Array = NDArray[np.int64]
DocumentRuns = Sequence[tuple[str, int]]
Mark = tuple[int, int, "str | None", list[str], list[tuple[int, int]]]


class DocumentTable:
    """The documents of a datastore, read when first asked for."""

    def __init__(self, directory: Path, meta: DatastoreMeta) -> None:
        self._directory = directory
        self._meta = meta.documents
        self._num_entries = meta.num_entries
        self._deleted = () if meta.deleted is None else meta.deleted.documents

    def __len__(self) -> int:
        return 0 if self._meta is None else self._meta.count

    @cached_property
    def offsets(self) -> Tensor:
        """(count + 1,) int64, ascending from 0 to num_entries."""
        if self._meta is None:
            return torch.zeros(1, dtype=torch.int64, device="cpu")
        offsets = torch.full(
            (self._meta.count + 1,), self._num_entries, dtype=torch.int64, device="cpu"
        )
        begun = self._meta.starts.num_bytes // START_BYTES
        if begun:
            path = self._directory / self._meta.starts.file
            buffer = map_file(path, self._meta.starts.num_bytes)
            offsets[:begun] = torch.frombuffer(buffer, dtype=torch.int64)
        if bool((offsets.diff() < 0).any()) or int(offsets[0]) != 0:
            raise CorruptDatastoreError(f"{self._directory}: document bounds are not ascending")
        return offsets

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of deleted documents "", whatever the file still says."""
        if self._meta is None:
            return ()
        path = self._directory / self._meta.names.file
        names = _read_names(path, self._meta.names.num_bytes)
        if len(names) != self._meta.count:
            problem = f"{path}: {len(names):,} document names, want {self._meta.count:,}"
            raise CorruptDatastoreError(problem, [problem])
        if self._deleted:
            gone = holds(self._deleted, len(names))
            names = tuple("" if out else name for name, out in zip(names, gone, strict=True))
        return names

    @cached_property
    def hashes(self) -> NDArray[np.uint8] | None:
        """(count, 16), zeros where a document's is not known or it is deleted; None: no file."""
        if self._meta is None or self._meta.hashes is None:
            return None
        path, size = self._directory / self._meta.hashes.file, self._meta.hashes.num_bytes
        check_file(path, size)
        with path.open("rb") as file:
            found = np.frombuffer(file.read(size), np.uint8).reshape(-1, HASH_BYTES)
        if self._deleted:
            found = np.where(holds(self._deleted, len(found))[:, None], np.uint8(0), found)
        return found


class DocumentWriter:
    """The same table while it grows. Rows must arrive in order of document.

    A document has begun once it has a first row. Names may run ahead of that: at the end of a
    build all planned names are stored, and a later extension may still begin their documents.
    Hashes go with the names, in a file that is there from the first document or never.
    """

    def __init__(
        self,
        directory: Path,
        meta: DocumentsMeta | None,
        *,
        hashed: bool = False,
        prefix: str = "",
        deleted: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._prefix = prefix
        directory = directory / prefix
        self._deleted = np.array([bound for run in deleted for bound in run], dtype=np.int64)
        self._starts = _reopen(directory / STARTS_FILE, None if meta is None else meta.starts)
        self._names = _reopen(directory / NAMES_FILE, None if meta is None else meta.names)
        self._hashes: AppendFile | None = None
        if hashed if meta is None else meta.hashes is not None:
            part = None if meta is None else meta.hashes
            self._hashes = _reopen(directory / HASHES_FILE, part)
        self._planned_hashes = b""
        stored = _read_names(self._names.path, self._names.length)
        self._named = len(stored)
        self._begun = self._starts.length // START_BYTES
        self._last_name = stored[self._begun - 1] if self._begun else None
        self._planned: list[str] = list(stored)

    @property
    def _files(self) -> list[AppendFile]:
        return [file for file in (self._starts, self._names, self._hashes) if file is not None]

    def meta(self) -> DocumentsMeta:
        files = [
            FileMeta(self._prefix + file.path.name, file.length, file.checksum)
            for file in self._files
        ]
        return DocumentsMeta(self._named, *files)

    def plan(self, names: Sequence[str], hashes: bytes | None = None) -> None:
        """Names and hashes for documents 0, 1, ...; those that are stored must be the same."""
        stored = _read_names(self._names.path, self._names.length)
        for document, (old, new) in enumerate(zip(stored, names, strict=False)):
            if old != new:
                raise ValueError(
                    f"names: document {document} is stored as {old!r}, not {new!r}; "
                    "name documents before their rows are appended"
                )
        self._planned = [*stored, *names[len(stored) :]]
        if self._hashes is not None and hashes is not None:
            self._plan_hashes(self._hashes, hashes)

    def _plan_hashes(self, file: AppendFile, hashes: bytes) -> None:
        stored, unknown = file.path.read_bytes()[: file.length], bytes(HASH_BYTES)
        for begin in range(0, min(len(stored), len(hashes)), HASH_BYTES):
            old, new = stored[begin : begin + HASH_BYTES], hashes[begin : begin + HASH_BYTES]
            if old != new and unknown not in (old, new):
                raise ValueError(
                    f"hashes: document {self._planned[begin // HASH_BYTES]!r} is stored with "
                    "another text; hashes must be those of the build so far"
                )
        self._planned_hashes = hashes

    def append_ids(self, ids: Int64Array, first_row: int) -> None:
        """``ids[i]`` is the document of row ``first_row + i``."""
        last = self._begun - 1
        if len(ids) and int(ids[0]) < max(last, 0):
            raise ValueError(
                f"documents: row {first_row} is of document {int(ids[0])}, after document {last}; "
                "want ids from 0 that never go back"
            )
        gone = self._are_deleted(ids)
        gone[:1] |= bool(len(ids)) and int(ids[0]) == last and self._is_over(first_row)
        if gone.any():
            raise ValueError(
                f"documents: row {first_row + int(gone.argmax())} is of document "
                f"{int(ids[gone.argmax()])}, which is deleted; number those that are appended "
                f"from {max(last, int(ids[gone].max())) + 1}"
            )
        falls = np.flatnonzero(np.diff(ids) < 0)
        if len(falls):
            row = first_row + int(falls[0]) + 1
            raise ValueError(f"documents: ids go back at row {row}; want ids that never go back")
        used, positions = np.unique(ids, return_index=True)
        fresh = used >= self._begun
        if fresh.any():
            self.begin(used[fresh], positions[fresh] + first_row)

    def append_runs(self, runs: DocumentRuns, first_row: int) -> None:
        """``(name, rows)`` pairs in row order. Neighbouring pairs of one name are one document."""
        if self._is_over(first_row):
            self._last_name = None  # one of the same name begins anew
        for name, rows in runs:
            if name != self._last_name:
                while self._are_deleted(np.array([self._begun]))[0]:  # a name that had no rows
                    self.begin_up_to(self._begun + 1, first_row)
                if self._begun < len(self._planned) and self._planned[self._begun] != name:
                    raise ValueError(
                        f"documents: document {self._begun} is planned as "
                        f"{self._planned[self._begun]!r}, not {name!r}"
                    )
                self._planned[self._begun :] = [name, *self._planned[self._begun + 1 :]]
                self._write(np.array([first_row], dtype=np.int64))
            first_row += rows

    def _are_deleted(self, ids: Int64Array) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = np.searchsorted(self._deleted, ids, side="right") % 2 == 1
        return found

    def _is_over(self, first_row: int) -> bool:
        """Whether the last one that has begun is deleted: compacted, it has a place and no rows."""
        last = self._begun - 1
        if last < 0 or self._are_deleted(np.array([last]))[0]:
            return True
        with self._starts.path.open("rb") as file:
            file.seek(self._starts.length - START_BYTES)
            return int.from_bytes(file.read(START_BYTES), "little") >= first_row

    def begin_up_to(self, count: int, row: int) -> None:
        """Of the first ``count`` documents those that have not begun do so at ``row``, empty."""
        if count > self._begun:
            self._write(np.full(count - self._begun, row, dtype=np.int64))

    def begin_anew(self) -> None:
        """The next run begins a document, whatever its name."""
        self._last_name = None

    def end(self) -> None:
        """Store every planned name, so that ids of documents without rows keep their meaning."""
        self._name(len(self._planned))

    def begin(self, used: Int64Array, starts: Int64Array) -> None:
        """Begin all documents up to ``used[-1]``; ``starts`` are the first rows of ``used``."""
        if int(used[-1]) - self._begun - len(used) > _MAX_EMPTY:
            raise ValueError(
                f"documents: got id {int(used[-1])} after {self._begun} documents; "
                "want documents numbered 0, 1, 2, ... in order"
            )
        # An id that has no rows begins, and ends, where the next one that has rows begins.
        every = np.arange(self._begun, int(used[-1]) + 1)
        self._write(starts[np.searchsorted(used, every)])

    def _write(self, starts: Int64Array) -> None:
        self._starts.append(starts.astype("<i8").data.cast("B"))
        self._begun += len(starts)
        self._name(self._begun)
        self._last_name = self._planned[self._begun - 1]

    def _name(self, count: int) -> None:
        self._planned += [str(document) for document in range(len(self._planned), count)]
        text = "".join(json.dumps(name) + "\n" for name in self._planned[self._named : count])
        self._names.append(memoryview(text.encode("ascii")))
        if self._hashes is not None and count > self._named:
            known = self._planned_hashes[self._named * HASH_BYTES : count * HASH_BYTES]
            missing = bytes((count - self._named) * HASH_BYTES - len(known))
            self._hashes.append(memoryview(known + missing))
        self._named = max(self._named, count)

    def mark(self) -> Mark:
        """A point to which :meth:`roll_back` can return."""
        files = [(file.length, file.crc) for file in self._files]
        return self._begun, self._named, self._last_name, list(self._planned), files

    def roll_back(self, mark: Mark) -> None:
        self._begun, self._named, self._last_name, self._planned, files = mark
        for file, (length, crc) in zip(self._files, files, strict=True):
            file.truncate(length, crc)

    def sync(self) -> None:
        for file in self._files:
            file.sync()

    def close(self) -> None:
        for file in self._files:
            file.close()


def ids_and_names(what: str, documents: Iterable[int | str]) -> tuple[set[int], set[str]]:
    """Documents as they are given, by id or by name; TypeError for what is neither.

    A float or a string of bytes would pass for some id, which is another document.
    """
    if isinstance(documents, str):
        raise TypeError(f"{what} must be a list of documents, got the one name {documents!r}")
    try:
        given = list(documents)
    except TypeError:
        raise TypeError(f"{what} must be a list of ids or names, got {documents!r}") from None
    ids: set[int] = set()
    for one in given:
        kind = getattr(one, "dtype", None)
        if isinstance(one, bool | np.bool_) or kind == torch.bool:
            raise TypeError(f"{what} must hold ids or names of documents, got {one!r}")
        if not isinstance(one, str):
            try:
                ids.add(operator.index(one))
            except TypeError:
                raise TypeError(
                    f"{what} must hold ids or names of documents, got {one!r}"
                ) from None
    return ids, {one for one in given if isinstance(one, str)}


def hash_bytes(hashes: Any, count: int) -> bytes:
    """(count, 16) uint8 as bytes, with zeros for "not known"; ValueError for another shape."""
    array = np.asarray(hashes)
    if array.dtype != np.uint8 or array.shape != (count, HASH_BYTES):
        raise ValueError(
            f"hashes: got {array.dtype} of shape {array.shape}, want uint8 of "
            f"({count}, {HASH_BYTES}): one a name"
        )
    return array.tobytes()


def check_runs(runs: object, num_rows: int) -> list[tuple[str, int]]:
    """``runs`` as (name, rows) pairs that cover ``num_rows``; ValueError or TypeError if not."""
    if not isinstance(runs, Sequence) or isinstance(runs, str):
        raise TypeError("documents: want (n,) int ids, or a list of (name, num_rows) pairs")
    pairs = []
    for run in runs:
        if not (isinstance(run, tuple | list) and len(run) == 2 and isinstance(run[0], str)):
            raise TypeError(f"documents: got {run!r}, want a (name, num_rows) pair")
        if operator.index(run[1]) < 1:
            raise ValueError(f"documents: {run[0]!r} has {run[1]} rows, want at least 1")
        pairs.append((run[0], operator.index(run[1])))
    total = sum(rows for _, rows in pairs)
    if total != num_rows:
        raise ValueError(f"documents: the pairs cover {total} rows, want {num_rows}")
    return pairs


def drop_rows(runs: DocumentRuns, count: int) -> list[tuple[str, int]]:
    """``runs`` without their first ``count`` rows."""
    kept = []
    for name, rows in runs:
        skipped = min(rows, count)
        count -= skipped
        if rows > skipped:
            kept.append((name, rows - skipped))
    return kept


def first_rows(runs: DocumentRuns, count: int) -> list[tuple[str, int]]:
    """The first ``count`` rows of ``runs``; neighbours of one name are one."""
    found: list[tuple[str, int]] = []
    for name, rows in runs:
        taken = min(rows, count)
        count -= taken
        if taken and found and found[-1][0] == name:
            found[-1] = (name, found[-1][1] + taken)
        elif taken:
            found.append((name, taken))
    return found


def _reopen(path: Path, meta: FileMeta | None) -> AppendFile:
    if meta is None:
        return AppendFile(path)
    return AppendFile(path, meta.num_bytes, parse_checksum(meta.checksum))


def _read_names(path: Path, num_bytes: int) -> tuple[str, ...]:
    if not num_bytes:
        return ()
    check_file(path, num_bytes)
    with path.open("rb") as file:
        lines = file.read(num_bytes).splitlines()
    try:
        names = tuple(json.loads(b"[" + b",".join(lines) + b"]"))  # all at once is much faster
        if len(names) != len(lines):
            raise ValueError(f"{len(names):,} values in {len(lines):,} lines")
    except (ValueError, RecursionError) as error:
        problem = f"{path}: not one JSON string a line ({error})"
        raise CorruptDatastoreError(problem, [problem]) from None
    if not all(isinstance(name, str) for name in names):
        raise CorruptDatastoreError(f"{path}: a document name is not a string")
    return names
