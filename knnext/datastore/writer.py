"""Building a datastore so that a kill at any moment loses only what came after the last commit.

Rows go straight to the end of the last shard; nothing on disk counts until ``build.json`` says so.
A commit syncs the files, then replaces ``build.json``. Finishing renames it to ``meta.json``. The
bytes of the files depend on the rows alone, not on how they were cut into appends and commits, so
a resumed build ends with the same bytes as an unbroken one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch

from knnext.datastore.batch import Batch, check_batch
from knnext.datastore.documents import DocumentTable, DocumentWriter, first_rows, hash_bytes
from knnext.datastore.errors import (
    DatastoreFullError,
    DatastoreWriteError,
    IncompatibleDatastoreError,
)
from knnext.datastore.files import (
    WriterLock,
    check_file,
    replace_file,
    sync_directory,
)
from knnext.datastore.meta import BUILD_FILE, META_FILE, DatastoreMeta, DocumentsMeta, ShardMeta
from knnext.datastore.meta_file import to_json
from knnext.datastore.open_shard import OpenShard, check_content, remove_leftovers
from knnext.datastore.rows import ShardFiles
from knnext.errors import FULL

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Mark:
    """Where a failed append returns to."""

    sealed: int
    shard: ShardMeta | None
    documents: Any


class DatastoreWriter:
    """The writing side of one datastore. Made by ``resume.open_writer``."""

    def __init__(
        self, directory: Path, meta: DatastoreMeta, lock: WriterLock, commit_seconds: float
    ) -> None:
        self.directory = directory
        self._base = meta
        self._lock = lock
        self._failure: str | None = None
        self._commit_seconds = commit_seconds
        self._commit_time = time.monotonic()
        self._committed = to_json(meta)
        self._commit_due = False
        self._planned_names: Sequence[str] = ()
        self._planned_hashes: bytes | None = None
        self._sealed = list(meta.shards)
        self._shard: OpenShard | None = None
        self._documents: DocumentWriter | None = None
        self._reopen(meta)

    def _reopen(self, meta: DatastoreMeta) -> None:
        remove_leftovers(self.directory, meta)
        for shard in meta.shards:
            for part in (shard.keys, shard.values):
                check_file(self.directory / part.file, part.num_bytes)
        if self._sealed and self._sealed[-1].rows < meta.entries_per_shard:
            last = self._sealed.pop()
            check_content(self.directory, last.keys, last.values)
            self._shard = self._open_shard(last)
        if meta.documents is not None:
            check_content(self.directory, *meta.documents.files())
            self._documents = self._open_documents(meta.documents)

    def _open_shard(self, shard: ShardMeta | None = None) -> OpenShard:
        """The one behind those that are full."""
        prefix = self._base.prefix
        return OpenShard(self.directory, len(self._sealed), shard, prefix=prefix)

    def _open_documents(
        self, meta: DocumentsMeta | None, *, hashed: bool = False
    ) -> DocumentWriter:
        deleted = () if self._base.deleted is None else self._base.deleted.documents
        return DocumentWriter(
            self.directory, meta, hashed=hashed, prefix=self._base.prefix, deleted=deleted
        )

    @property
    def num_entries(self) -> int:
        """Rows appended so far, committed or not."""
        sealed = len(self._sealed) * self._base.entries_per_shard
        return sealed + (0 if self._shard is None else self._shard.rows)

    def meta(self) -> DatastoreMeta:
        """What a commit would write now."""
        shards = list(self._sealed)
        if self._shard is not None and self._shard.rows:
            shards.append(self._shard.meta())
        documents = None if self._documents is None else self._documents.meta()
        return replace(
            self._base,
            num_entries=self.num_entries,
            shards=tuple(shards),
            documents=documents,
        )

    def set_document_names(self, names: Sequence[str], hashes: Any = None) -> None:
        """See :meth:`knnext.datastore.Datastore.set_document_names`."""
        bad = next((name for name in names if not isinstance(name, str)), None)
        if bad is not None or isinstance(names, str):
            raise TypeError(f"names: got {bad or names!r}, want a sequence of str")
        self._planned_names = tuple(names)
        self._planned_hashes = None if hashes is None else hash_bytes(hashes, len(names))
        if self._documents is not None:
            self._documents.plan(self._planned_names, self._planned_hashes)

    def begin_documents(self, count: int) -> None:
        """The first ``count`` of the named documents have a place, though no rows came of them."""
        self._check_usable()
        if self._documents is None:
            self._documents = self._new_documents()
        self._documents.begin_up_to(count, self.num_entries)

    def begin_anew(self) -> None:
        """What comes next is of new documents: of none that is there, if only by its name."""
        if self._documents is not None:
            self._documents.begin_up_to(self._documents.meta().count, self.num_entries)
            self._documents.begin_anew()

    def check_begun_with(self, keys: Any, values: Any, documents: Any, first: int) -> None:
        """IncompatibleDatastoreError unless the rows from ``first`` on are the first of these."""
        batch = check_batch(self._base, keys, values, documents, first)
        meta, known = replace(self.meta(), deleted=None), self.num_entries - first
        shards = [(self.directory / shard.keys.file, shard.rows) for shard in meta.shards]
        stored = ShardFiles(shards, (meta.dim,), meta.dtype).read(first, first + known)
        table = DocumentTable(self.directory, meta)
        rows = zip(
            table.names, table.offsets[:-1].tolist(), table.offsets.diff().tolist(), strict=True
        )
        begun = [(name, count) for name, start, count in rows if count and start >= first]
        same = known <= len(batch) and begun == first_rows(batch.runs or (), known)
        if not (same and torch.equal(stored, batch.keys[:known])):
            raise IncompatibleDatastoreError(
                f"{self.directory}: another extension has begun, with {known:,} rows, and not "
                "ended: go on with that one first"
            )

    def set_deleted(self, meta: DatastoreMeta) -> None:
        """At its end the build deletes what ``meta`` does."""
        self._base = replace(self._base, deleted=meta.deleted, audit=meta.audit)

    def append(
        self, keys: Any, values: Any, documents: Any = None, start: int | None = None
    ) -> None:
        """See :meth:`knnext.datastore.Datastore.append`."""
        self._check_usable()
        first = self.num_entries if start is None else start
        batch = check_batch(self._base, keys, values, documents, first)
        batch = self._skip_known(batch, first)
        if not len(batch):
            return
        self._check_documents_kept(batch)
        # Before the rows rather than after: an append that raises has then appended nothing.
        if self._commit_due or time.monotonic() - self._commit_time > self._commit_seconds:
            self.commit()
        with self._all_or_nothing():
            self._append_documents(batch)
            self._append_rows(batch)

    def _skip_known(self, batch: Batch, first: int) -> Batch:
        known = self.num_entries - first
        if known < 0 or first < 0:
            raise ValueError(
                f"start: got {first}, want at most {self.num_entries}, the next row: "
                "a gap would lose rows"
            )
        known = min(known, len(batch))
        if known:
            stored = self._stored_values(first, first + known)
            differs = (stored != torch.from_numpy(batch.values[:known])).nonzero()
            if len(differs):
                raise IncompatibleDatastoreError(
                    f"{self.directory}: row {first + int(differs[0])} is stored with another "
                    "value; this is not the text that the build began with"
                )
        return batch.drop(known)

    def _stored_values(self, first: int, last: int) -> torch.Tensor:
        shards = [(self.directory / shard.values.file, shard.rows) for shard in self.meta().shards]
        return ShardFiles(shards, (), torch.int32).read(first, last)

    def _check_documents_kept(self, batch: Batch) -> None:
        given = batch.ids is not None or batch.runs is not None
        if self.num_entries and given != (self._documents is not None):
            has = "without" if given else "with"
            raise ValueError(
                f"documents: this datastore was begun {has} documents; "
                "give them with every append, or with none"
            )

    def _append_documents(self, batch: Batch) -> None:
        if batch.ids is None and batch.runs is None:
            return
        if self._documents is None:
            self._documents = self._new_documents()
        if batch.ids is not None:
            self._documents.append_ids(batch.ids, self.num_entries)
        elif batch.runs is not None:
            self._documents.append_runs(batch.runs, self.num_entries)

    def _new_documents(self) -> DocumentWriter:
        made = self._open_documents(None, hashed=self._planned_hashes is not None)
        made.plan(self._planned_names, self._planned_hashes)
        return made

    def _append_rows(self, batch: Batch) -> None:
        done = 0
        while done < len(batch):
            if self._shard is None:
                self._shard = self._open_shard()
            count = min(len(batch) - done, self._base.entries_per_shard - self._shard.rows)
            self._shard.append(batch, done, count)
            done += count
            if self._shard.rows == self._base.entries_per_shard:
                self._seal()

    def _seal(self) -> None:
        assert self._shard is not None
        self._shard.sync()
        self._shard.close()
        self._sealed.append(self._shard.meta())
        self._shard = None
        self._commit_due = True

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        mark = _Mark(
            len(self._sealed),
            None if self._shard is None else self._shard.meta(),
            None if self._documents is None else self._documents.mark(),
        )
        try:
            yield
        except BaseException as error:
            self._try_to(lambda: self._roll_back(mark))
            if isinstance(error, OSError):
                raise self._write_error(error) from error
            raise

    def _roll_back(self, mark: _Mark) -> None:
        if self._shard is not None:
            self._shard.close()
        del self._sealed[mark.sealed :]
        self._shard = None
        if mark.shard is not None:
            self._shard = self._open_shard(mark.shard)
        if self._documents is not None:
            if mark.documents is None:
                self._documents.close()
                self._documents = None
            else:
                self._documents.roll_back(mark.documents)
        remove_leftovers(self.directory, self.meta())

    def _try_to(self, recover: Callable[[], None]) -> None:
        try:
            recover()
        except OSError as error:
            self._failure = f"could not undo a failed write ({error})"

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise DatastoreWriteError(
                f"{self.directory}: {self._failure}; what was committed is intact. "
                "Close this build and resume it"
            )

    def _write_error(self, error: OSError) -> DatastoreWriteError:
        free = disk_usage(self.directory).free
        kind = DatastoreFullError if error.errno in FULL else DatastoreWriteError
        return kind(
            f"{self.directory}: {error.strerror or error} after {self.num_entries:,} entries "
            f"({free:,} bytes free on this disk). Nothing written before is lost: make room and "
            "append again, or resume with Datastore.create(..., resume=True)"
        )

    def commit(self) -> None:
        """Make every row so far survive a kill or a power cut."""
        self._check_usable()
        content = to_json(self.meta())
        if content != self._committed:
            try:
                self._sync()
                replace_file(self.directory / BUILD_FILE, content)
            except OSError as error:
                raise self._write_error(error) from error
            self._committed = content
            _log.debug("%s: committed %d rows", self.directory, self.num_entries)
        self._commit_due = False
        self._commit_time = time.monotonic()

    def _sync(self) -> None:
        if self._shard is not None:
            self._shard.sync()
        if self._documents is not None:
            self._documents.sync()
        # The names of new shards, before build.json lists them.
        sync_directory(self.directory / self._base.prefix)

    def finish(self) -> None:
        """Commit, and turn the build into a finished datastore."""
        if self._failure is not None:
            self.release()
        self._check_usable()
        if self._documents is not None:
            with self._all_or_nothing():
                self._documents.end()
        self.commit()
        build = self.directory / BUILD_FILE
        if build.exists():
            try:
                build.replace(self.directory / META_FILE)
                sync_directory(self.directory)
            except OSError as error:
                raise self._write_error(error) from error
        self.release()

    def abandon(self) -> None:
        """Commit what can be committed and let go; the build stays unfinished."""
        try:
            self.commit()
        except DatastoreWriteError:
            pass  # the last commit stands, and the caller has an error of its own to show
        finally:
            self._failure = "this build was left after an error"
            self.release()

    def release(self) -> None:
        if self._shard is not None:
            self._shard.close()
        if self._documents is not None:
            self._documents.close()
        self._lock.release()
