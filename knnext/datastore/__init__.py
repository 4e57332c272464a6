"""The datastore: keys and the tokens that followed them, on disk, as torch tensors.

A folder of flat files that is never loaded whole. It says what it holds (``meta.json``), survives
a kill during its build, and notices damage. docs/datastore-format.md specifies every byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from knnext.datastore import compacting, deletion, replacing
from knnext.datastore.batch import ArrayLike, Documents
from knnext.datastore.copy import check_mergeable, copy_rows, merge_rows, same_text, sample_rows
from knnext.datastore.errors import (
    CorruptDatastoreError,
    DatastoreError,
    DatastoreLockedError,
    DatastoreWriteError,
    FormatVersionError,
    IncompatibleDatastoreError,
    UnfinishedDatastoreError,
)
from knnext.datastore.legacy import LegacyRows
from knnext.datastore.meta import (
    BUILD_FILE,
    DatastoreMeta,
    ModelParts,
    Origin,
    TextFacts,
    check_byte_order,
    new_meta,
)
from knnext.datastore.meta_file import read_finished, read_meta
from knnext.datastore.parts import join
from knnext.datastore.reader import DatastoreReader
from knnext.datastore.resume import open_writer
from knnext.datastore.room import check_room, row_bytes
from knnext.datastore.verify import Progress, check_sizes
from knnext.datastore.writer import DatastoreWriter

__all__ = [
    "CorruptDatastoreError",
    "Datastore",
    "DatastoreError",
    "DatastoreLockedError",
    "DatastoreWriteError",
    "FormatVersionError",
    "IncompatibleDatastoreError",
    "UnfinishedDatastoreError",
]


class Datastore(DatastoreReader):
    """Keys (num_entries, dim) and values (num_entries,) int32, row i of one for row i of the other.

    Make one with :meth:`create`, read one with :meth:`open`. :meth:`shard` and :meth:`subsample`
    give views, which read the same files and are datastores in every respect but that they cannot
    be written to.
    """

    _writer: DatastoreWriter | None = None

    # Writing

    @classmethod
    def create(
        cls,
        path: str | Path,
        dim: int,
        dtype: torch.dtype = torch.float16,
        *,
        metric: str = "l2",
        key_layer: str | None = None,
        model_id: str | None = None,
        model_revision: str | None = None,
        model: ModelParts | None = None,
        tokenizer_hash: str | None = None,
        vocab_size: int | None = None,
        corpus: str | None = None,
        text: TextFacts | None = None,
        origin: Origin | None = None,
        entries_per_shard: int | None = None,
        resume: bool = False,
        commit_seconds: float = 60.0,
    ) -> Datastore:
        """Begin a datastore in the folder ``path``, or with ``resume`` go on with one.

        A resumed build must repeat its parameters; ``num_entries`` then is the row to go on with.
        A finished datastore can be resumed too, to append more. Best used in a ``with`` block: at
        its end the datastore is finished, after an exception it stays an unfinished build.

        Args:
            dim: width of a key.
            dtype: of the stored keys: torch.float16, bfloat16 or float32.
            metric: "l2" or "ip", what the keys are meant to be searched with.
            key_layer: which activation the keys are, such as "att" or "ffn".
            model: what ``model_revision`` is made of, by which a mismatch is explained.
            text: which split of which corpus, see `knnext.corpus.SplitFacts.to_dict`.
            origin: where the rows come from, if not from a model: str, int, float or bool values.
            entries_per_shard: rows of a shard file; by default what fits 1 GiB of keys.
            commit_seconds: a commit is made at the first append after so long, beside the one
                after each full shard. A kill loses at most what came after the last commit.

        Raises:
            DatastoreError: ``path`` holds something else, or a datastore and not ``resume``.
            IncompatibleDatastoreError: a resumed build has other parameters; names each.
            DatastoreLockedError: another process is writing to it.
        """
        meta = new_meta(
            dim,
            dtype,
            entries_per_shard,
            metric=metric,
            key_layer=key_layer,
            model_id=model_id,
            model_revision=model_revision,
            model=model,
            tokenizer_hash=tokenizer_hash,
            vocab_size=vocab_size,
            corpus=corpus,
            text=text,
            origin=origin,
        )
        writer = open_writer(
            Path(path),
            meta,
            entries_per_shard=entries_per_shard,
            resume=resume,
            commit_seconds=commit_seconds,
        )
        store = cls(Path(path), writer.meta(), unfinished=True)
        store._writer = writer
        return store

    def append(
        self,
        keys: ArrayLike,
        values: ArrayLike,
        documents: Documents | None = None,
        *,
        start: int | None = None,
    ) -> None:
        """Append n rows, all of them or (on any error) none.

        Args:
            keys: (n, dim) of a float dtype, on any device; stored as the datastore's dtype.
            values: (n,) integers in [0, vocab_size).
            documents: (n,) integer ids, from 0 and never going back; or ``(name, rows)`` pairs,
                of which neighbours of one name, also across calls, are one document. Either with
                every append of a datastore or with none.
            start: the row that ``keys[0]`` is. Rows that the datastore has already are skipped,
                after comparing their values; so a build may be replayed from any earlier row.

        Raises:
            ValueError: a key holds NaN or infinity, or a value is out of range; names the row.
            DatastoreWriteError: the disk refused. Rows appended before are kept.
        """
        self._writing("append").append(keys, values, documents, start)

    def set_document_names(
        self, names: Sequence[str], hashes: NDArray[np.uint8] | None = None
    ) -> None:
        """Names of documents 0, 1, ...; before their rows are appended. Repeat when resuming.

        Documents without a name are called by their number. At the end of the build every name
        has its document, if need be one without rows.

        ``hashes`` (len(names), 16) uint8 stand for the texts (``Document.content_hash``), so that
        an evaluation can tell whether it scores what is stored; zeros where one is not known. A
        datastore keeps them from its first document on, or never.
        """
        self._writing("set_document_names").set_document_names(names, hashes)

    def commit(self) -> None:
        """Make every row so far survive a kill or a power cut. Costs a few fsyncs."""
        self._writing("commit").commit()

    def close(self) -> None:
        """Finish the build (it then can be read), or let go of mapped files when reading."""
        if self._writer is None:
            self._keys.unmap()
            self._values.unmap()
            return
        self._writer.finish()
        self._writer = None
        super().__init__(self.path, read_finished(self.path))

    # Deleting

    def delete(self, documents: Sequence[int | str]) -> int:
        """Delete documents by name or id, and return how many rows that were.

        From the moment at which it returns no reader, search or copy sees their rows, names and
        hashes: this object and the indexes of it at once, others when they open the datastore. The
        rows behind move up, document ids stay. All documents of a name are deleted; what was
        deleted before is passed over. It is one rename: after a kill either none or all are.

        What is stored stays on the disk until :meth:`compact`. ``meta.audit`` notes when, how many
        rows, and hashes of the names.

        Raises:
            ValueError: there is no such document; nothing is deleted then.
            DatastoreError: of a view, without documents, or while an extension has not ended.
            DatastoreLockedError: another process is writing to it.
        """
        self._changing("delete")
        meta, rows = deletion.delete(self.path, documents)
        self._become(meta)
        return rows

    def replace(self, keys: ArrayLike, values: ArrayLike, documents: Documents) -> int:
        """Append rows and delete the documents that have their names: both at once, or neither.

        Returns how many rows were deleted. After a kill the same call does what is left of it; one
        of other keys, values or documents is refused until then. Nothing is lost of an interrupted
        one: the old documents are read meanwhile.

        Args:
            keys, values: as of :meth:`append`.
            documents: ``(name, rows)`` pairs. Names that are not there yet are added.
        """
        self._changing("replace")
        meta, rows = replacing.replace(self.path, keys, values, documents)
        self._become(meta)
        return rows

    def compact(self, progress: Progress | None = None) -> int:
        """Write the datastore anew without its deleted rows, and remove the old files.

        Returns how many rows are gone. Ids of documents stay; of deleted ones an empty name is
        left. Until one rename at its end readers see the old files, and after a kill the same call
        goes on. Codes and indexes are of the old rows: `knnext.index.compact` and ``knnext
        compact`` renew and remove them too, as they hold what was deleted.

        Raises:
            DatastoreWriteError: the disk has not the room for what is left, beside the old files.
        """
        self._changing("compact")
        meta, rows = compacting.compact(self, progress)
        self._become(meta)
        return rows

    def _changing(self, what: str) -> None:
        self._reading(what)
        if not self.is_whole or self.unfinished or self.row_offset:
            state = "an unfinished build" if self.unfinished else "a view"
            raise DatastoreError(f"{self.path}: {what} of {state}; open the datastore itself")

    def _become(self, meta: DatastoreMeta) -> None:
        """Go on as what is stored now; views of what it was are of no use."""
        path, deletions = self.path, self._deletions
        if meta == self._meta:
            return
        self._keys.unmap()
        self._values.unmap()
        self.__dict__.clear()  # what was derived, too
        super().__init__(path, meta)
        deletions[0] += 1
        self._deletions, self._seen = deletions, deletions[0]

    def __enter__(self) -> Datastore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._writer is not None:
            self._writer.abandon()
        else:
            self.close()

    # Opening

    @classmethod
    def open(
        cls, path: str | Path, *, verify: bool = False, allow_unfinished: bool = False
    ) -> Datastore:
        """Open for reading. Reads ``meta.json`` and file sizes only; nothing is loaded.

        Args:
            verify: compare all checksums first, which reads every byte.
            allow_unfinished: where a build (or an extension) has not ended, open what it has
                committed. By default a reader sees finished datastores only.

        Raises:
            UnfinishedDatastoreError, FormatVersionError, CorruptDatastoreError, DatastoreError
        """
        check_byte_order()
        path = Path(path)
        unfinished = allow_unfinished and (path / BUILD_FILE).exists()
        meta = read_meta(path, BUILD_FILE) if unfinished else read_finished(path)
        while True:
            try:
                check_sizes(path, meta)
                break
            except DatastoreError:
                before = meta
                meta = before if unfinished else read_finished(path)
                if meta == before:  # and else it was compacted between the two
                    raise
        store = cls(path, meta, unfinished=unfinished)
        if verify:
            store.verify()
        return store

    # Parts and wholes

    def subsample(
        self,
        fraction: float,
        seed: int = 0,
        path: str | Path | None = None,
        *,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> Datastore:
        """round(fraction * num_entries) rows, in row order; a view, or stored at ``path``.

        The same seed gives the same rows, and a smaller fraction a subset of them. Document ids
        stay. A view holds its row numbers (8 bytes each) and copies rows when read.
        """
        rows = sample_rows(self.num_entries, fraction, seed)
        view = self._view((self.keys.select(rows), self.values.select(rows)))
        if path is None:
            return view
        check_room(path, len(rows), row_bytes(self.dim, self.dtype))
        origin: Origin = {"subsample_of": self.fingerprint, "fraction": fraction, "seed": seed}
        with self._create_like(path, origin, resume) as target:
            copy_rows(target._writing("copy"), view, progress)
        return target

    @staticmethod
    def merge(
        stores: Sequence[Datastore],
        path: str | Path,
        *,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> Datastore:
        """Store the rows of all ``stores``, one after another, at ``path``; documents renumbered.

        IncompatibleDatastoreError where dim, dtype, metric, layer, model, tokenizer or vocabulary
        differ. Rows stream, so memory stays small; ``resume`` goes on with a merge that was killed.
        """
        check_mergeable(stores)
        rows = sum(store.num_entries for store in stores)
        check_room(path, rows, row_bytes(stores[0].dim, stores[0].dtype))
        prints = " ".join(store.fingerprint for store in stores)
        corpora = {store.meta.corpus for store in stores}
        facts = {"corpus": corpora.pop() if len(corpora) == 1 else None, "text": same_text(stores)}
        with stores[0]._create_like(path, {"merge_of": prints}, resume, **facts) as target:
            merge_rows(target._writing("merge"), stores, progress)
        return target

    @staticmethod
    def join(path: str | Path) -> Datastore:
        """The datastore whose parts lie in ``path``, opened; joined first, if it is not yet.

        Parts are made by ``build_datastore(..., part=)`` or ``parts=``. No row is copied.
        UnfinishedDatastoreError names those that are missing.
        """
        join(Path(path))
        return Datastore.open(path)

    @staticmethod
    def import_legacy(
        source: str | Path,
        path: str | Path,
        *,
        num_entries: int | None = None,
        dim: int | None = None,
        key_dtype: torch.dtype | None = None,
        value_dtype: torch.dtype | None = None,
        num_valid: int | None = None,
        unwrap_int16: bool = False,
        vocab_size: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Datastore:
        """Store the rows of another kNN-LM program's ``source`` at ``path``.

        What is read, and the arguments down to ``vocab_size``, are told by
        :class:`knnext.datastore.legacy.LegacyRows`; ``options`` are those of :meth:`create`, since
        the files do not tell. ``meta.origin`` says what was found and dropped.
        """
        rows = LegacyRows(
            source,
            num_entries=num_entries,
            dim=dim,
            key_dtype=key_dtype,
            value_dtype=value_dtype,
            num_valid=num_valid,
            unwrap_int16=unwrap_int16,
            vocab_size=vocab_size,
        )
        check_room(path, rows.num_entries, row_bytes(rows.dim, rows.key_dtype))
        with Datastore.create(
            path, rows.dim, rows.key_dtype, vocab_size=vocab_size, origin=rows.origin, **options
        ) as target:
            rows.append_to(target._writing("import_legacy"), progress)
        return target

    # On the Hugging Face Hub

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Send it to the dataset repository ``repo_id`` in one commit; a new one is private.

        Options (``revision``, ``private``, ``token``, ``commit_message``, ``license``, ``include``,
        ``verify``), errors and the result are those of :func:`knnext.hub.push`.
        """
        return _hub().push(self, repo_id, **options)

    @staticmethod
    def from_hub(repo_id: str, folder: str | Path | None = None, **options: Any) -> Datastore:
        """Fetch the datastore of a dataset repository, checked to the last byte, and open it.

        Options (``revision``, ``only``, ``shards``, ``parts``, ``cache_dir``, ``token``,
        ``progress``), errors and the result are those of :func:`knnext.hub.pull`.
        """
        store: Datastore = _hub().pull(repo_id, folder, **options)
        return store

    # Inside

    @property
    def num_entries(self) -> int:
        """Real rows: nothing pads, nothing is allocated ahead. While writing: rows so far."""
        return super().num_entries if self._writer is None else self._writer.num_entries

    @property
    def meta(self) -> DatastoreMeta:
        """What the stored datastore says of itself; of a view: the whole that it is a part of."""
        return super().meta if self._writer is None else self._writer.meta()

    def _create_like(
        self, path: str | Path, origin: Origin, resume: bool, **facts: Any
    ) -> Datastore:
        meta = self.meta
        facts = {"corpus": meta.corpus, "text": meta.text, **facts}
        bos = (meta.origin or {}).get("bos")  # what windows of an evaluation begin with, too
        origin = dict(origin) if bos is None else {**origin, "bos": bos}
        return Datastore.create(
            path,
            meta.dim,
            meta.dtype,
            metric=meta.metric,
            key_layer=meta.key_layer,
            model_id=meta.model_id,
            model_revision=meta.model_revision,
            model=meta.model,
            tokenizer_hash=meta.tokenizer_hash,
            vocab_size=meta.vocab_size,
            origin=origin,
            resume=resume,
            **facts,
        )

    def _writing(self, what: str) -> DatastoreWriter:
        if self._writer is None:
            raise DatastoreError(
                f"{self.path}: {what}() needs a datastore from Datastore.create(); this one is "
                "open for reading"
            )
        return self._writer

    def _reading(self, what: str) -> None:
        if self._writer is not None:
            raise DatastoreError(
                f"{self.path}: {what} of a datastore that is being written; close() it first, or "
                "open what is committed with Datastore.open(path, allow_unfinished=True)"
            )
        super()._reading(what)


def _hub() -> Any:
    """By its name: that room comes after this one, and knows the indexes and fits in between."""
    return import_module("knnext.hub")
