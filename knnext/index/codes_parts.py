"""Codes that several processes make: each writes its rows into its own range of the same files.

A row's code lies where its number says, so nothing has to be put together: the files have the bytes
that one process writes. While the work goes on the folder of the codes holds beside them

    parts.json           of which datastore, and how many rows each part has
    part-00003.json      how much of a part is committed, and its checksums
    .part-00003.lock     the claim on it

The center is that of one process, made by whoever comes first. Parts are cut at multiples of 65,536
rows, so that no two of them share a page of a file, as file systems of networks may write whole
ones. When all are whole their checksums are combined, and ``codes.json`` is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knnext.datastore.claims import check_locks, in_turn, take_all, when_free
from knnext.datastore.errors import DatastoreLockedError, UnfinishedDatastoreError
from knnext.datastore.file_range import FileRange, combine_crc32
from knnext.datastore.files import (
    WriterLock,
    format_checksum,
    parse_checksum,
    replace_file,
    sync_directory,
)
from knnext.datastore.meta import part_folder
from knnext.datastore.meta_file import ranges
from knnext.datastore.parts import check_part, cut
from knnext.errors import IndexMismatchError
from knnext.index.codes_meta import (
    BUILD_FILE,
    CODES_FILE,
    META_FILE,
    STATS_BYTES,
    STATS_FILE,
    CodesMeta,
    damaged,
    naming_the_disk,
    parse_meta,
    read_center,
)
from knnext.index.sidecar import read_json
from knnext.ops import encode_keys
from knnext.progress import Progress
from knnext.say import as_typed

if TYPE_CHECKING:
    from torch import Tensor

    from knnext.datastore import Datastore

PLAN_FILE = "parts.json"
_MAGIC = "knnext-codes-parts"
_ROWS = 1 << 16  # parts are cut at multiples of it
PARTS_PER_RANK = 8


@dataclass(frozen=True)
class Plan:
    """What is to be encoded, with no rows yet, and the rows of each part."""

    codes: CodesMeta
    rows: tuple[int, ...]

    def place(self, number: int) -> tuple[int, int]:
        """Rows [first, last) of part ``number``, counted from 1."""
        first = sum(self.rows[: number - 1])
        return first, first + self.rows[number - 1]

    @property
    def numbers(self) -> range:
        return range(1, len(self.rows) + 1)


def is_planned(folder: Path) -> bool:
    """Whether codes were begun there in parts that are not joined yet."""
    return (folder / PLAN_FILE).exists() and not (folder / BUILD_FILE).exists()


def build_parts(
    datastore: Datastore,
    folder: Path,
    begin: Callable[[], CodesMeta],
    *,
    part: tuple[int, int] | None,
    parts: int | None,
    rank: tuple[int, int],
    commit_rows: int,
    chunk_rows: int,
) -> bool:
    """Encode one part, or those that nobody has taken; whether all are joined then.

    ``begin`` makes the center and says what the codes are of; called where nothing is begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if part is not None:
        check_part(*part)
    asked = parts if part is None else part[1]
    plan = _open_plan(datastore, folder, begin, asked, rank[1])
    work = _Part(datastore, folder, plan, commit_rows, chunk_rows)
    if part is not None:
        work.write(part[0])
        if missing(folder, plan):
            return False
    else:
        check_locks(folder)
        take_all(
            in_turn(len(plan.rows), *rank),
            done=lambda number: _is_done(folder, plan, number),
            work=work.write,
            state=lambda number: _state(folder, number),
            what="part of the codes",
        )
    join(datastore, folder)
    return True


def join(datastore: Datastore, folder: Path) -> None:
    """Make one of the parts in ``folder``; UnfinishedDatastoreError names those missing."""
    with when_free(folder):
        if not is_planned(folder):
            return
        plan = read_plan(folder)
        _check_of(plan, datastore.undeleted(), folder)
        absent = missing(folder, plan)
        if absent:
            count = len(plan.rows)
            raise UnfinishedDatastoreError(
                f"{folder}: of the {count} parts of the codes {count - len(absent)} are whole; "
                f"missing: {ranges(absent)}. `knnext index {as_typed(datastore.path)} --kind "
                f"codes --part {absent[0]}/{count}` makes one, --parts {count} all"
            )
        meta = _joined(folder, plan)
        for name in (CODES_FILE, STATS_FILE):
            _sync(folder / name)
        # As one process ends: first all of it under the name of what is begun, which then wins
        # over the parts, and at last under its own.
        replace_file(folder / BUILD_FILE, meta.to_json())
        discard_parts(folder)
        (folder / BUILD_FILE).replace(folder / META_FILE)
        sync_directory(folder)


def discard_parts(folder: Path) -> None:
    """Remove what is there of parts beside the codes themselves."""
    for path in (folder / PLAN_FILE, *folder.glob("part-*.json*"), *folder.glob(".part-*.lock")):
        path.unlink(missing_ok=True)


def check_unclaimed(folder: Path) -> None:
    """DatastoreLockedError where a process is at work on a part."""
    for path in folder.glob(".part-*.lock"):
        _claim(folder, path.name).release()


def read_plan(folder: Path) -> Plan:
    path = folder / PLAN_FILE
    body = read_json(path)
    if body.get("magic") != _MAGIC:
        raise IndexMismatchError(f"{path} does not plan codes of knnext")
    try:
        return Plan(parse_meta(body["codes"]), tuple(int(rows) for rows in body["rows"]))
    except (KeyError, TypeError, ValueError) as error:
        raise IndexMismatchError(f"{path} is malformed: {error}") from None


def missing(folder: Path, plan: Plan) -> list[int]:
    return [number for number in plan.numbers if not _is_done(folder, plan, number)]


def _open_plan(
    datastore: Datastore, folder: Path, begin: Callable[[], CodesMeta], asked: int | None, size: int
) -> Plan:
    if not is_planned(folder):
        with when_free(folder):
            if not is_planned(folder):
                _begin(datastore, folder, begin, asked, size)
    plan = read_plan(folder)
    _check_of(plan, datastore, folder)
    if asked not in (None, len(plan.rows)):
        raise IndexMismatchError(
            f"{folder}: codes were begun in {len(plan.rows)} parts, not in {asked}; go on in as "
            "many, or discard them with overwrite=True (--overwrite), by one process"
        )
    return plan


def _begin(
    datastore: Datastore, folder: Path, begin: Callable[[], CodesMeta], asked: int | None, size: int
) -> None:
    rows = datastore.num_entries
    ends = np.minimum(np.arange(_ROWS, rows + _ROWS, _ROWS), rows) if rows else np.empty(0, int)
    count = max(1, min(PARTS_PER_RANK * size, len(ends))) if asked is None else asked
    codes = begin()
    plan = {
        "magic": _MAGIC,
        "rows": [part.rows for part in cut(ends, count)],
        "codes": asdict(codes),
    }
    replace_file(folder / PLAN_FILE, (json.dumps(plan, indent=1) + "\n").encode())
    sync_directory(folder.parent)


def _check_of(plan: Plan, datastore: Datastore, folder: Path) -> None:
    found = plan.codes.datastore, plan.codes.dim, sum(plan.rows)
    if found != (datastore.fingerprint, datastore.dim, datastore.num_entries):
        raise IndexMismatchError(
            f"{folder} holds the parts of codes of another datastore than {datastore.path} is now; "
            "discard them with overwrite=True (--overwrite)"
        )


def _read_state(folder: Path, number: int) -> tuple[int, int, int]:
    """Committed rows of a part, and the checksums of their codes and statistics."""
    try:
        body = read_json(folder / _state_name(number))
        return int(body["rows"]), parse_checksum(body["codes"]), parse_checksum(body["stats"])
    except FileNotFoundError:
        return 0, 0, 0
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(f"{folder / _state_name(number)}: {error}") from None


def _is_done(folder: Path, plan: Plan, number: int) -> bool:
    if not (folder / PLAN_FILE).exists():  # joined by another a moment ago
        return True
    return _read_state(folder, number)[0] == plan.rows[number - 1]


def _state_name(number: int) -> str:
    return f"{part_folder(number)}.json"


def _state(folder: Path, number: int) -> object:
    try:
        return (folder / _state_name(number)).stat().st_mtime_ns
    except OSError:
        return None


def _claim(folder: Path, name: str) -> WriterLock:
    try:
        return WriterLock(folder, name)
    except DatastoreLockedError:
        raise DatastoreLockedError(
            f"{folder}: another process is encoding {name.removeprefix('.').removesuffix('.lock')}"
        ) from None


class _Part:
    """One part at a time, from its last commit to its end."""

    def __init__(
        self, datastore: Datastore, folder: Path, plan: Plan, commit_rows: int, chunk_rows: int
    ) -> None:
        self.datastore, self.folder, self.plan = datastore, folder, plan
        self.commit_rows, self.chunk_rows = commit_rows, chunk_rows
        self._done = 0  # rows of the part in hand that are committed

    def write(self, number: int) -> None:
        name = f".{part_folder(number)}.lock"
        lock = _claim(self.folder, name)
        try:
            if not (self.folder / PLAN_FILE).exists():  # joined a moment ago
                (self.folder / name).unlink(missing_ok=True)
            elif not _is_done(self.folder, self.plan, number):
                with naming_the_disk(self.folder, self.plan.rows[number - 1], lambda: self._done):
                    self._write(number, read_center(self.folder))
        finally:
            lock.release()

    def _write(self, number: int, center: Tensor) -> None:
        dim, (first, last) = self.datastore.dim, self.plan.place(number)
        done, *crcs = _read_state(self.folder, number)
        self._done = done
        codes, stats = (
            FileRange(self.folder / name, first * size, done * size, crc)
            for name, size, crc in zip(
                (CODES_FILE, STATS_FILE), (dim, STATS_BYTES), crcs, strict=True
            )
        )
        try:
            for file in (codes, stats):
                if file.content_crc() != file.crc:
                    raise damaged(f"{file.path} is damaged: part {number} has changed (checksum)")
            self._encode(number, codes, stats, (first + done, last), center)
        finally:
            codes.close()
            stats.close()

    def _encode(
        self,
        number: int,
        codes: FileRange,
        stats: FileRange,
        place: tuple[int, int],
        center: Tensor,
    ) -> None:
        begin, last = place
        rows = self.datastore.keys.range(begin, last)
        size = self.plan.rows[number - 1]
        title = f"encode part {number} of {len(self.plan.rows)}"
        with Progress(size, title, "rows") as bar:
            bar.update(size - len(rows))
            for start, stop in rows.pieces(self.chunk_rows):
                coded = encode_keys(rows[start:stop], center)
                codes.append(coded.codes.numpy().data.cast("B"))
                stats.append(coded.stats.numpy().data.cast("B"))
                bar.update(stop - start)
                if size - len(rows) + stop - self._done >= self.commit_rows:
                    self._commit(number, codes, stats)
            self._commit(number, codes, stats)

    def _commit(self, number: int, codes: FileRange, stats: FileRange) -> None:
        codes.sync()
        stats.sync()
        sync_directory(self.folder)
        rows = stats.length // STATS_BYTES
        state: dict[str, Any] = {
            "rows": rows,
            "codes": format_checksum(codes.crc),
            "stats": format_checksum(stats.crc),
        }
        replace_file(self.folder / _state_name(number), (json.dumps(state) + "\n").encode())
        self._done = rows


def _joined(folder: Path, plan: Plan) -> CodesMeta:
    crcs, rows = [0, 0], 0
    sizes = (plan.codes.dim, STATS_BYTES)
    for number in plan.numbers:
        done, *own = _read_state(folder, number)
        rows += done
        crcs = [
            combine_crc32(crc, more, done * size)
            for crc, more, size in zip(crcs, own, sizes, strict=True)
        ]
    codes, stats = (
        replace(file, num_bytes=rows * size, checksum=format_checksum(crc))
        for file, size, crc in zip((plan.codes.codes, plan.codes.stats), sizes, crcs, strict=True)
    )
    for file in (codes, stats):
        found = (folder / file.file).stat().st_size if (folder / file.file).exists() else 0
        if found < file.num_bytes:
            raise damaged(
                f"{folder / file.file} is truncated: {found:,} of {file.num_bytes:,} bytes"
            )
    return replace(plan.codes, num_entries=rows, codes=codes, stats=stats)


def _sync(path: Path) -> None:
    if path.exists():
        file = FileRange(path, 0)
        try:
            file.sync()
        finally:
            file.close()
