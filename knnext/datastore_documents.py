"""Which rows belong to which document: the stored table, and its growth during a build.

Document ``d`` owns rows ``offsets[d]`` to ``offsets[d + 1]``. On disk only the first rows are
kept, because those never change once written: the table grows by appending, like the shards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.datastore_errors import CorruptDatastoreError
from knnext.datastore_files import AppendFile, check_file, map_file, parse_checksum
from knnext.datastore_meta import NAMES_FILE, STARTS_FILE, DocumentsMeta, FileMeta

# Ids that nobody used become empty documents; a hash taken for an id would make billions.
_MAX_EMPTY = 1 << 24

Int64Array = NDArray[np.int64]
DocumentRuns = Sequence[tuple[str, int]]


class DocumentTable:
    """The documents of a datastore, read when first asked for."""

    def __init__(self, directory: Path, meta: DocumentsMeta | None, num_entries: int) -> None:
        self._directory = directory
        self._meta = meta
        self._num_entries = num_entries

    def __len__(self) -> int:
        return 0 if self._meta is None else self._meta.count

    @cached_property
    def offsets(self) -> Tensor:
        """(count + 1,) int64, ascending from 0 to num_entries."""
        if self._meta is None:
            return torch.zeros(1, dtype=torch.int64)
        offsets = torch.empty(self._meta.count + 1, dtype=torch.int64)
        if self._meta.count:
            path = self._directory / self._meta.starts.file
            buffer = map_file(path, self._meta.starts.num_bytes)
            offsets[:-1] = torch.frombuffer(buffer, dtype=torch.int64)
        offsets[-1] = self._num_entries
        if bool((offsets.diff() < 0).any()) or int(offsets[0]) != 0:
            raise CorruptDatastoreError(f"{self._directory}: document bounds are not ascending")
        return offsets

    @cached_property
    def names(self) -> tuple[str, ...]:
        if self._meta is None:
            return ()
        path = self._directory / self._meta.names.file
        names = _read_names(path, self._meta.names.num_bytes)
        if len(names) != self._meta.count:
            problem = f"{path}: {len(names):,} document names, want {self._meta.count:,}"
            raise CorruptDatastoreError(problem, [problem])
        return names


class DocumentWriter:
    """The same table while it grows. Rows must arrive in order of document."""

    def __init__(self, directory: Path, meta: DocumentsMeta | None) -> None:
        self.count = 0 if meta is None else meta.count
        self.last_name: str | None = None
        self._planned: list[str] = []
        self._starts = _reopen(directory / STARTS_FILE, None if meta is None else meta.starts)
        self._names = _reopen(directory / NAMES_FILE, None if meta is None else meta.names)
        if meta is not None:
            begun = _read_names(self._names.path, self._names.length)
            self.last_name = begun[-1] if begun else None

    def meta(self) -> DocumentsMeta:
        files = [
            FileMeta(file.path.name, file.length, file.checksum)
            for file in (self._starts, self._names)
        ]
        return DocumentsMeta(self.count, *files)

    def plan_names(self, names: Sequence[str]) -> None:
        """Names for documents 0, 1, ...; those that have begun must already have them."""
        begun = _read_names(self._names.path, self._names.length)
        for document, (old, new) in enumerate(zip(begun, names, strict=False)):
            if old != new:
                raise ValueError(
                    f"names: document {document} is stored as {old!r}, not {new!r}; "
                    "name documents before their rows are appended"
                )
        self._planned = list(names)

    def append_ids(self, ids: Int64Array, first_row: int) -> None:
        """``ids[i]`` is the document of row ``first_row + i``."""
        last = self.count - 1
        if len(ids) and int(ids[0]) < max(last, 0):
            raise ValueError(
                f"documents: row {first_row} is of document {int(ids[0])}, after document {last}; "
                "want ids from 0 that never go back"
            )
        falls = np.flatnonzero(np.diff(ids) < 0)
        if len(falls):
            row = first_row + int(falls[0]) + 1
            raise ValueError(f"documents: ids go back at row {row}; want ids that never go back")
        used, positions = np.unique(ids, return_index=True)
        self._begin(used, positions + first_row)

    def append_runs(self, runs: DocumentRuns, first_row: int) -> None:
        """``(name, rows)`` pairs in row order. Neighbouring pairs of one name are one document."""
        for name, rows in runs:
            if name != self.last_name or not self.count:
                self._write([name], np.array([first_row], dtype=np.int64))
            first_row += rows

    def end(self, num_entries: int) -> None:
        """Give every planned name its document, so that ids past the last row keep meaning."""
        missing = len(self._planned) - self.count
        if missing > 0:
            starts = np.full(missing, num_entries, dtype=np.int64)
            self._write(self._planned[self.count :], starts)

    def _begin(self, used: Int64Array, starts: Int64Array) -> None:
        fresh = used >= self.count
        if not fresh.any():
            return
        used, starts = used[fresh], starts[fresh]
        if int(used[-1]) - self.count - len(used) > _MAX_EMPTY:
            raise ValueError(
                f"documents: got id {int(used[-1])} after {self.count} documents; "
                "want documents numbered 0, 1, 2, ... in order"
            )
        every = np.arange(self.count, int(used[-1]) + 1)
        names = [self._planned[d] if d < len(self._planned) else str(d) for d in every.tolist()]
        # An id that has no rows begins, and ends, where the next one that has rows begins.
        self._write(names, starts[np.searchsorted(used, every)])

    def _write(self, names: Sequence[str], starts: Int64Array) -> None:
        text = "".join(json.dumps(name) + "\n" for name in names)
        self._names.append(memoryview(text.encode("ascii")))
        self._starts.append(starts.astype("<i8").data.cast("B"))
        self.count += len(names)
        self.last_name = names[-1]

    def mark(self) -> tuple[int, str | None, list[tuple[int, int]]]:
        """A point to which :meth:`roll_back` can return."""
        files = [(file.length, file.crc) for file in (self._starts, self._names)]
        return self.count, self.last_name, files

    def roll_back(self, mark: tuple[int, str | None, list[tuple[int, int]]]) -> None:
        self.count, self.last_name, files = mark
        for file, (length, crc) in zip((self._starts, self._names), files, strict=True):
            file.truncate(length, crc)

    def sync(self) -> None:
        self._starts.sync()
        self._names.sync()

    def close(self) -> None:
        self._starts.close()
        self._names.close()


def check_runs(runs: object, num_rows: int) -> list[tuple[str, int]]:
    """``runs`` as (name, rows) pairs that cover ``num_rows``; ValueError or TypeError if not."""
    if not isinstance(runs, Sequence) or isinstance(runs, str):
        raise TypeError("documents: want (n,) int ids, or a list of (name, num_rows) pairs")
    pairs = []
    for run in runs:
        if not (isinstance(run, tuple | list) and len(run) == 2 and isinstance(run[0], str)):
            raise TypeError(f"documents: got {run!r}, want a (name, num_rows) pair")
        if int(run[1]) < 1:
            raise ValueError(f"documents: {run[0]!r} has {run[1]} rows, want at least 1")
        pairs.append((run[0], int(run[1])))
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
        names = tuple(json.loads(line) for line in lines)
    except ValueError as error:
        problem = f"{path}: not one JSON string a line ({error})"
        raise CorruptDatastoreError(problem, [problem]) from None
    if not all(isinstance(name, str) for name in names):
        raise CorruptDatastoreError(f"{path}: a document name is not a string")
    return names
