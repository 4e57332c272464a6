"""Reading a datastore: lazily, as a whole or as a view of some of its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.datastore.describe import describe
from knnext.datastore.documents import DocumentTable
from knnext.datastore.errors import DatastoreError, IncompatibleDatastoreError
from knnext.datastore.kept import KeptRows
from knnext.datastore.meta import BUILD_FILE, META_FILE, DatastoreMeta, model_differences
from knnext.datastore.meta_file import to_json
from knnext.datastore.rows import LazyRows, Place, ShardFiles, check_rows
from knnext.datastore.verify import Progress, verify
from knnext.lm.config_facts import settings_differences

if TYPE_CHECKING:
    from typing_extensions import Self


class DatastoreReader:
    """The reading half of :class:`knnext.datastore.Datastore`.

    Attributes:
        path: the folder.
        row_offset: the row, in the datastore that :meth:`shard` was called on, of row 0.
        unfinished: True where only the committed part of an unfinished build is seen.
    """

    path: Path
    row_offset: int
    unfinished: bool

    def __init__(
        self,
        path: Path,
        meta: DatastoreMeta,
        *,
        rows: tuple[LazyRows, LazyRows] | None = None,
        row_offset: int = 0,
        unfinished: bool = False,
    ) -> None:
        """Internal: use ``Datastore.open``. ``rows`` make a view."""
        self.path = path
        self.row_offset = row_offset
        self.unfinished = unfinished
        self._meta = meta
        self._keys, self._values = rows or _stored_rows(path, meta)
        self._documents = DocumentTable(path, meta)
        #: How often rows were deleted through this object; views know it, and which they have seen.
        self._deletions = [0]
        self._seen = 0

    def __len__(self) -> int:
        return self.num_entries

    @property
    def num_entries(self) -> int:
        """Real rows: nothing pads, nothing is allocated ahead."""
        return len(self._keys)

    @property
    def meta(self) -> DatastoreMeta:
        """What the stored datastore says of itself; of a view: the whole that it is a part of."""
        return self._meta

    @property
    def is_whole(self) -> bool:
        """Whether all rows are seen that are not deleted: it is no view of some of them."""
        lost = 0 if self._meta.deleted is None else self._meta.deleted.num_rows
        return len(self._keys) == self._meta.num_entries - lost

    @property
    def kept_rows(self) -> KeptRows | None:
        """Which stored rows these are, where some are deleted: of the whole, None of any other."""
        return self._keys.kept if self.is_whole else None

    @property
    def generation(self) -> int:
        """Grows with each deletion through this object; DatastoreError of a view from before."""
        self._reading("rows")
        return self._seen

    @property
    def is_current(self) -> bool:
        """Whether its files still say what they said when it was opened.

        Other processes may have deleted, replaced or appended since: open it again then.
        """
        name = BUILD_FILE if self.unfinished else META_FILE
        try:
            return (self.path / name).read_bytes() == to_json(self._meta)
        except FileNotFoundError:
            return False

    def undeleted(self) -> Self:
        """With the rows that are deleted and still stored, as codes and indexes are made of them.

        A view stays what it is.
        """
        if self._meta.deleted is None or not self.is_whole:
            return self
        meta = replace(self._meta, deleted=None)
        return type(self)(self.path, meta, unfinished=self.unfinished)

    @property
    def dim(self) -> int:
        return self._meta.dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys."""
        return self._meta.dtype

    @property
    def metric(self) -> str:
        return self._meta.metric

    @property
    def key_layer(self) -> str | None:
        return self._meta.key_layer

    @property
    def vocab_size(self) -> int | None:
        return self._meta.vocab_size

    @property
    def keys(self) -> LazyRows:
        """(num_entries, dim): ``keys[a:b]``, ``keys[indices]`` give tensors."""
        self._reading("keys")
        return self._keys

    @property
    def values(self) -> LazyRows:
        """(num_entries,) int32: the token that followed each key. ``values[:]`` loads them all."""
        self._reading("values")
        return self._values

    def iter_chunks(self, rows: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (start, keys (n, dim), values (n,) int32) in order; n is ``rows`` or the rest."""
        if rows < 1:
            raise ValueError(f"rows: got {rows}, want at least 1")
        keys, values = self.keys, self.values
        for start in range(0, self.num_entries, rows):
            stop = min(start + rows, self.num_entries)
            yield start, keys[start:stop], values[start:stop]

    # Documents

    @property
    def num_documents(self) -> int:
        """0 where the build gave no documents. A view keeps all ids, some of them without rows."""
        self._reading("num_documents")
        return len(self._documents)

    @property
    def document_names(self) -> Sequence[str]:
        self._reading("document_names")
        return self._documents.names

    @property
    def document_hashes(self) -> NDArray[np.uint8] | None:
        """(num_documents, 16): each document's ``content_hash``; None where none were kept."""
        self._reading("document_hashes")
        return self._documents.hashes

    @cached_property
    def document_offsets(self) -> Tensor:
        """(num_documents + 1,) int64: document d has rows offsets[d] to offsets[d + 1]."""
        self._reading("document_offsets")
        return self._keys.local(self._documents.offsets)

    def document_of(self, rows: Tensor) -> Tensor:
        """Document ids of ``rows``, int64 of the same shape and device; -1 stays -1."""
        if not self.num_documents:
            raise DatastoreError(f"{self.path}: was built without documents")
        checked = check_rows(rows, self.num_entries, padding=True)
        found = torch.searchsorted(self.document_offsets, checked, right=True) - 1
        return found.masked_fill_(checked < 0, -1).to(rows.device)

    def shard(self, index: int, num_shards: int) -> Self:
        """The ``index``-th of ``num_shards`` contiguous, near-equal ranges of rows, as a view."""
        if not 0 <= index < num_shards:
            raise ValueError(f"index: got {index} of {num_shards} shards")
        first = index * self.num_entries // num_shards
        last = (index + 1) * self.num_entries // num_shards
        return self.rows(first, last)

    def rows(self, first: int, last: int) -> Self:
        """Rows [first, last) as a view."""
        if not 0 <= first <= last <= self.num_entries:
            raise ValueError(f"rows: got [{first}, {last}) of {self.num_entries}")
        return self._view((self.keys.range(first, last), self.values.range(first, last)), first)

    def stored_rows(self, rows: Tensor) -> Tensor:
        """Row numbers in the files of ``rows`` of this view, int64."""
        return self.keys.stored_rows(check_rows(rows, self.num_entries))

    # Trust

    def verify(self, progress: Progress | None = None) -> None:
        """Read all files and compare checksums; CorruptDatastoreError lists every bad one.

        ``progress(done, total)`` gets bytes, now and then, from one thread at a time.
        """
        verify(self.path, self.meta, progress)

    def check_compatible(self, **expected: Any) -> None:
        """IncompatibleDatastoreError unless the datastore was built for what is ``expected``.

        Keywords are fields of :attr:`meta` (model_id, key_layer, dim, dtype, metric,
        tokenizer_hash, vocab_size, ...). What is None, here or in the datastore, is not compared.
        ``model`` tells in what a ``model_revision`` differs, and where that is the same, decides by
        what no weights tell: a quantization's kind, settings of the model's config.
        """
        unknown = expected.keys() - DatastoreMeta.__dataclass_fields__.keys()
        if unknown:
            raise TypeError(f"check_compatible() knows no {', '.join(sorted(unknown))}")
        model = expected.pop("model", None)
        found = [
            f"{name}: datastore has {getattr(self.meta, name)!r}, want {want!r}"
            for name, want in expected.items()
            if want is not None and getattr(self.meta, name) not in (None, want)
        ]
        if any(text.startswith("model_revision:") for text in found):
            found += filter(None, [model_differences(self.meta.model, model)])
        else:
            found += settings_differences(self.meta.model, model)
        if found:
            raise IncompatibleDatastoreError(f"{self.path}: " + "; ".join(found))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what is stored, and of which rows of it a view takes.

        An index notes it, to know its datastore again.
        """
        digest = _digest(self.meta)
        if self.meta.deleted is not None:
            digest.update(repr(self.meta.deleted.rows).encode())
        if not self.is_whole:
            digest.update(self._keys.identity())
        return digest.hexdigest()

    @property
    def stored_fingerprint(self) -> str:
        """Of what is in the files: of the whole that a view is a part of, deleted rows or not."""
        return str(_digest(self.meta).hexdigest())

    def describe(self) -> str:
        """What is stored, in lines of text."""
        return describe(self.path, self.meta, unfinished=self.unfinished)

    def __repr__(self) -> str:
        return (
            f"Datastore({str(self.path)!r}, num_entries={self.num_entries}, dim={self.dim}, "
            f"dtype={self.dtype}, metric={self.metric!r})"
        )

    # Inside

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the folder's place and which rows are seen, and opens the folder again."""
        self._reading("a pickle")
        kind, path, meta = type(self), self.path.absolute(), to_json(self._meta)
        return _reopen, (kind, path, meta, self.unfinished, self._keys.place(), self.row_offset)

    def _view(self, rows: tuple[LazyRows, LazyRows], row_offset: int = 0) -> Self:
        view = type(self)(
            self.path,
            self._meta,
            rows=rows,
            row_offset=self.row_offset + row_offset,
            unfinished=self.unfinished,
        )
        view._deletions, view._seen = self._deletions, self._seen
        return view

    def _reading(self, what: str) -> None:
        """Raise where ``what`` cannot be read yet, or not any more."""
        if self._seen != self._deletions[0]:
            raise DatastoreError(
                f"{self.path}: rows were deleted since this view of it was made: make it again"
            )


def _digest(meta: DatastoreMeta) -> Any:
    """Of what is in the files, whatever of it is deleted."""
    return hashlib.blake2b(to_json(replace(meta, deleted=None, audit=None)), digest_size=8)


def _reopen(
    kind: Any, path: Path, meta: bytes, unfinished: bool, place: Place, row_offset: int
) -> Any:
    store = kind.open(path, allow_unfinished=unfinished)
    if to_json(store.meta) != meta:
        raise IncompatibleDatastoreError(
            f"{path}: holds another datastore than the one that was pickled"
        )
    view = store._view((store.keys.at(place), store.values.at(place)))
    view.row_offset = row_offset
    return view


def _stored_rows(path: Path, meta: DatastoreMeta) -> tuple[LazyRows, LazyRows]:
    kept = None if meta.deleted is None else KeptRows(meta.num_entries, meta.deleted.rows)
    shards = [(path / s.keys.file, s.rows) for s in meta.shards]
    keys = ShardFiles(shards, (meta.dim,), meta.dtype, kept)
    shards = [(path / s.values.file, s.rows) for s in meta.shards]
    values = ShardFiles(shards, (), torch.int32, kept)
    return LazyRows(keys, 0, len(keys)), LazyRows(values, 0, len(values))
