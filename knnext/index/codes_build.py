"""Encoding the keys of a datastore, so that a kill loses only what came after the last commit.

Codes go to the end of ``codes.bin``, statistics to the end of ``stats.bin``; nothing of them counts
until ``build.json`` says so. When all rows are encoded it is renamed to ``codes.json``, and the
codes exist. A datastore that has grown is encoded on from there, with the center of its first rows.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knnext.datastore.claims import folder_state, take_all
from knnext.datastore.errors import DatastoreError, DatastoreLockedError
from knnext.datastore.files import (
    LOCK_FILE,
    AppendFile,
    WriterLock,
    format_checksum,
    parse_checksum,
    replace_file,
    sync_directory,
)
from knnext.datastore.meta import FileMeta, creation_time, installed_version
from knnext.datastore.room import check_disk, taken_bytes
from knnext.index import codes_parts
from knnext.index.codes_meta import (
    BUILD_FILE,
    CENTER_FILE,
    CODES_FILE,
    META_FILE,
    STATS_FILE,
    CodesMeta,
    check_content,
    check_continues,
    codes_bytes,
    key_files,
    naming_the_disk,
    read_center,
    read_meta,
)
from knnext.ops import encode_keys, mean_key
from knnext.progress import Progress

if TYPE_CHECKING:
    from knnext.datastore import Datastore

_CHUNK_BYTES = 64 << 20  # of keys encoded at once
_COMMIT_BYTES = 1 << 30  # of keys between two commits
CENTER_ROWS = 1 << 14  # whose mean is the center, or what fits _CHUNK_BYTES; in so many runs:
_CENTER_RUNS = 64


def build(
    datastore: Datastore,
    folder: Path,
    *,
    overwrite: bool = False,
    part: tuple[int, int] | None = None,
    parts: int | None = None,
    rank: tuple[int, int] = (0, 1),
) -> bool:
    """Encode what is not yet; codes that are finished stay as they are, unless `overwrite`.

    Several processes share `parts` that each takes as `rank` of so many, or make one `part` alone,
    as (3, 64). What was begun in parts is gone on with so. Whether the codes are finished.

    Raises:
        IndexMismatchError: the folder holds codes of another datastore, or damaged ones.
        DatastoreLockedError: another process is encoding there.
        DatastoreWriteError: the disk refused; what was committed stands, and is gone on from.
    """
    if not datastore.is_whole:
        raise ValueError(
            "codes are made of a whole datastore, this is a view of one: its parts find theirs"
        )
    alone = part is None and parts is None and rank[1] == 1
    if overwrite and not alone:
        raise ValueError(
            "overwrite is for one process, as each of several would discard what the others have "
            f"made: remove {folder} first"
        )
    if not overwrite and _is_finished(datastore, folder):
        return True
    needed = codes_bytes(datastore.num_entries, datastore.dim) - taken_bytes(folder)
    check_disk(folder, needed, "the codes", "make room there; the search works without codes too")
    planned = codes_parts.is_planned(folder)
    if not alone and not planned and any((folder / n).exists() for n in (BUILD_FILE, META_FILE)):
        # Begun by one process, of a datastore that has grown, or all but joined: one goes on.
        take_all(
            [1],
            done=lambda _: _is_finished(datastore, folder),
            work=lambda _: build(datastore, folder),
            state=lambda _: folder_state(folder),
            what="what is left of the codes: part",
        )
        return True
    if not overwrite and (planned or not alone):
        return _share(datastore, folder, part, parts, rank)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        if overwrite:
            codes_parts.check_unclaimed(folder)
            discard(folder)
        if not _is_finished(datastore, folder):
            _Encoding(datastore, folder).run()
            codes_parts.discard_parts(folder)
    finally:
        lock.release()
    return True


def _share(
    datastore: Datastore,
    folder: Path,
    part: tuple[int, int] | None,
    parts: int | None,
    rank: tuple[int, int],
) -> bool:
    row_bytes = datastore.meta.row_bytes
    return codes_parts.build_parts(
        datastore,
        folder,
        lambda: _begin(datastore, folder),
        part=part,
        parts=parts,
        rank=rank,
        chunk_rows=max(1, _CHUNK_BYTES // row_bytes),
        commit_rows=max(1, _COMMIT_BYTES // row_bytes),
    )


def _is_finished(datastore: Datastore, folder: Path) -> bool:
    try:
        found = read_meta(folder / META_FILE)
    except FileNotFoundError:
        return False
    return (found.datastore, found.num_entries) == (datastore.fingerprint, datastore.num_entries)


#: Of an encoding, finished or not; what makes the others count stands first.
_FILES = (META_FILE, BUILD_FILE, CODES_FILE, STATS_FILE, CENTER_FILE)


def is_begun(folder: Path) -> bool:
    """Whether there is anything of an encoding, finished or not, by one process or by several."""
    return any((folder / name).exists() for name in (*_FILES, codes_parts.PLAN_FILE))


def discard(folder: Path) -> None:
    """Remove the files of an encoding, finished or not, and nothing else."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    codes_parts.discard_parts(folder)
    sync_directory(folder)


def sample_of_center(datastore: Datastore) -> Tensor:
    """The rows whose mean is the center: all of them, or runs of rows at even distances.

    Any center is right, and a mean of so many rows is near enough. Which they are follows from the
    number of rows alone.
    """
    rows = datastore.num_entries
    run = max(1, min(CENTER_ROWS, _CHUNK_BYTES // datastore.meta.row_bytes) // _CENTER_RUNS)
    if rows <= run * _CENTER_RUNS:
        return datastore.keys[0:rows]
    starts = [number * (rows - run) // (_CENTER_RUNS - 1) for number in range(_CENTER_RUNS)]
    return torch.cat([datastore.keys[start : start + run] for start in starts])


def _lock(folder: Path) -> WriterLock:
    try:
        return WriterLock(folder)
    except DatastoreLockedError:
        raise DatastoreLockedError(
            f"{folder}: another process is encoding there; wait for it, or end it and encode "
            "again, which goes on from there"
        ) from None


class _Encoding:
    """One encoding, from the last commit to its end."""

    def __init__(self, datastore: Datastore, folder: Path) -> None:
        self.datastore, self.folder = datastore, folder
        self._committed = 0

    def run(self) -> None:
        with naming_the_disk(self.folder, self.datastore.num_entries, lambda: self._committed):
            begun = self._begun() or self._begin()
            self._committed = begun.num_entries
            check_content(self.folder, *(file for file in begun.files() if file.num_bytes))
            self._meta = replace(
                begun, datastore=self.datastore.fingerprint, key_files=key_files(self.datastore)
            )
            codes, stats = (
                AppendFile(self.folder / part.file, part.num_bytes, parse_checksum(part.checksum))
                for part in (begun.codes, begun.stats)
            )
            try:
                self._encode(codes, stats)
            finally:
                codes.close()
                stats.close()
            (self.folder / BUILD_FILE).replace(self.folder / META_FILE)
            sync_directory(self.folder)

    def _begun(self) -> CodesMeta | None:
        """The last commit, where its rows are still the datastore's first."""
        for name in (BUILD_FILE, META_FILE):
            try:
                meta = read_meta(self.folder / name)
            except FileNotFoundError:
                continue
            check_continues(meta, self.datastore, self.folder)
            return meta
        return None

    def _begin(self) -> CodesMeta:
        meta = _begin(self.datastore, self.folder)
        replace_file(self.folder / BUILD_FILE, meta.to_json())
        sync_directory(self.folder.parent)
        return meta

    def _encode(self, codes: AppendFile, stats: AppendFile) -> None:
        center = read_center(self.folder)
        row_bytes = self.datastore.meta.row_bytes
        step, commit_rows = (max(1, n // row_bytes) for n in (_CHUNK_BYTES, _COMMIT_BYTES))
        total = self.datastore.num_entries
        rows = self.datastore.keys.range(self._committed, total)
        with Progress(total, "encode the keys", "rows") as bar:
            bar.update(self._committed)
            begin = self._committed
            for first, last in rows.pieces(step):
                coded = encode_keys(rows[first:last], center)
                codes.append(coded.codes.numpy().data.cast("B"))
                stats.append(coded.stats.numpy().data.cast("B"))
                bar.update(last - first)
                if begin + last - self._committed >= commit_rows:
                    self._commit(begin + last, codes, stats)
            self._commit(total, codes, stats)

    def _commit(self, rows: int, codes: AppendFile, stats: AppendFile) -> None:
        """Make the rows so far survive a kill or a power cut."""
        codes.sync()
        stats.sync()
        sync_directory(self.folder)  # the names of the files, before build.json lists them
        of_codes, of_stats = (
            FileMeta(file.path.name, file.length, file.checksum) for file in (codes, stats)
        )
        meta = replace(self._meta, num_entries=rows, codes=of_codes, stats=of_stats)
        replace_file(self.folder / BUILD_FILE, meta.to_json())
        self._committed = rows


def _begin(datastore: Datastore, folder: Path) -> CodesMeta:
    """Write the center of codes of which there are none yet."""
    own = {LOCK_FILE, CENTER_FILE, CODES_FILE, STATS_FILE}
    own |= {f"{name}.tmp" for name in (BUILD_FILE, CENTER_FILE, codes_parts.PLAN_FILE)}
    foreign = sorted({path.name for path in folder.iterdir()} - own)
    if foreign:
        raise DatastoreError(
            f"{folder}: not empty (it holds {foreign[0]!r}) and not of codes; remove it"
        )
    discard(folder)  # what was left by a death before the first commit
    sample = sample_of_center(datastore)
    center = mean_key(sample).numpy().tobytes()
    replace_file(folder / CENTER_FILE, center)
    return CodesMeta(
        dim=datastore.dim,
        num_entries=0,
        datastore=datastore.fingerprint,
        key_files=key_files(datastore),
        center_rows=len(sample),
        center=FileMeta(CENTER_FILE, len(center), format_checksum(zlib.crc32(center))),
        codes=FileMeta(CODES_FILE, 0, format_checksum(0)),
        stats=FileMeta(STATS_FILE, 0, format_checksum(0)),
        created=creation_time(),
        knnext_version=installed_version(),
    )
