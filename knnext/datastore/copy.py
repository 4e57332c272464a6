"""Datastores made from datastores: merged, or a sample of one. Rows stream; memory is bounded.

Each copy is resumable, because which row comes next follows from the row count alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.datastore.errors import IncompatibleDatastoreError
from knnext.datastore.meta import HASH_BYTES, MEANING, TextFacts, check_same
from knnext.datastore.reader import DatastoreReader
from knnext.datastore.verify import Progress
from knnext.datastore.writer import DatastoreWriter

_CHUNK_BYTES = 32 << 20
_HASH_ROWS = 1 << 20
_BINS = 1 << 16


def chunk_rows(row_bytes: int) -> int:
    """Rows to stream at a time."""
    return max(1, _CHUNK_BYTES // row_bytes)


def merge_rows(
    target: DatastoreWriter, stores: Sequence[DatastoreReader], progress: Progress | None = None
) -> None:
    """Append all rows of ``stores`` to ``target``, which may hold the first of them already."""
    total = sum(store.num_entries for store in stores)
    with_documents = any(store.num_documents for store in stores)
    if with_documents:
        names = [_document_names(store) for store in stores]
        target.set_document_names(
            list(itertools.chain.from_iterable(names)), _document_hashes(stores)
        )
    row = document = 0
    for store in stores:
        done = min(max(target.num_entries - row, 0), store.num_entries)
        for start, keys, values in _chunks(store, done):
            ids = _document_ids(store, start, len(values)) + document if with_documents else None
            target.append(keys, values, ids, start=row + start)
            if progress is not None:
                progress(target.num_entries, total)
        row += store.num_entries
        document += max(1, store.num_documents)


def copy_rows(
    target: DatastoreWriter, store: DatastoreReader, progress: Progress | None = None
) -> None:
    """Append the rows of ``store``, a view, to ``target``; document ids stay as they are."""
    if store.num_documents:
        target.set_document_names(store.document_names, store.document_hashes)
    for start, keys, values in _chunks(store, target.num_entries):
        ids = _document_ids(store, start, len(values)) if store.num_documents else None
        target.append(keys, values, ids, start=start)
        if progress is not None:
            progress(target.num_entries, store.num_entries)


def check_mergeable(stores: Sequence[DatastoreReader]) -> None:
    """ValueError unless the keys and values of all ``stores`` mean the same."""
    if not stores:
        raise ValueError("stores: got none, want at least one datastore")
    for store in stores[1:]:
        check_same(stores[0].meta, store.meta, MEANING, f"cannot merge {store.path}")
        bos = [(one.meta.origin or {}).get("bos") for one in (stores[0], store)]
        if bos[0] != bos[1]:
            raise IncompatibleDatastoreError(
                f"cannot merge {store.path}: its windows begin with bos {bos[1]}, not {bos[0]}"
            )


def sample_rows(num_entries: int, fraction: float, seed: int) -> Tensor:
    """round(fraction * num_entries) distinct rows, ascending (n,) int64.

    Every row has a 64-bit hash of (seed, row); the rows of the smallest hashes are taken. So a
    smaller fraction of the same seed is a subset, and memory is that of the result.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: got {fraction}, want a number in [0, 1]")
    wanted = round(fraction * num_entries)
    if wanted == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    limit = _nth_smallest_hash(num_entries, seed, wanted)
    kept = [rows[hashes <= limit] for rows, hashes in _row_hashes(num_entries, seed)]
    return torch.from_numpy(np.concatenate(kept))


def _nth_smallest_hash(num_entries: int, seed: int, n: int) -> np.uint64:
    """Two passes, so that only the hashes of one bin in 65,536 are ever held."""
    counts = np.zeros(_BINS, dtype=np.int64)
    for _, hashes in _row_hashes(num_entries, seed):
        counts += np.bincount((hashes >> np.uint64(48)).astype(np.int64), minlength=_BINS)
    below = np.cumsum(counts)
    chosen = int(np.searchsorted(below, n))
    within = n - (int(below[chosen - 1]) if chosen else 0)
    in_bin = [
        hashes[(hashes >> np.uint64(48)) == chosen] for _, hashes in _row_hashes(num_entries, seed)
    ]
    return np.uint64(np.partition(np.concatenate(in_bin), within - 1)[within - 1])


def _row_hashes(
    num_entries: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
    """Rows and their hashes: the finaliser of splitmix64, a bijection, so no two rows tie."""
    offset = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    for first in range(0, num_entries, _HASH_ROWS):
        rows = np.arange(first, min(first + _HASH_ROWS, num_entries), dtype=np.int64)
        mixed = (rows.astype(np.uint64) + offset) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        yield rows, mixed ^ (mixed >> np.uint64(31))


def _chunks(store: DatastoreReader, first: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    step = chunk_rows(store.dim * store.dtype.itemsize)
    for start in range(first, store.num_entries, step):
        stop = min(start + step, store.num_entries)
        yield start, store.keys[start:stop], store.values[start:stop]


def _document_ids(store: DatastoreReader, start: int, count: int) -> Tensor:
    if not store.num_documents:  # beside documented stores, such a store is one document
        return torch.zeros(count, dtype=torch.int64, device="cpu")
    return store.document_of(torch.arange(start, start + count, device="cpu"))


def _document_names(store: DatastoreReader) -> Sequence[str]:
    return store.document_names if store.num_documents else [Path(store.path).name]


def _document_hashes(stores: Sequence[DatastoreReader]) -> NDArray[np.uint8] | None:
    """Of all documents, zeros for those of stores that keep none; None where no store does."""
    found = [store.document_hashes for store in stores]
    if all(hashes is None for hashes in found):
        return None
    blank = [np.zeros((len(_document_names(store)), HASH_BYTES), np.uint8) for store in stores]
    return np.concatenate([b if h is None else h for h, b in zip(found, blank, strict=True)])


def same_text(stores: Sequence[DatastoreReader]) -> TextFacts | None:
    """The facts that hold for all: of splits of one corpus, divided alike. None if there are none.

    Of several splits "split" names each, and no hash of the documents is known.
    """
    texts = [dict(store.meta.text or {}) for store in stores]
    splits = list(dict.fromkeys(str(text.get("split")) for text in texts))
    if len({text.get("documents") for text in texts}) > 1:
        for text in texts:
            text |= {"split": "+".join(splits), "documents": None, "max_bytes": None}
    return texts[0] if texts[0] and all(text == texts[0] for text in texts) else None
