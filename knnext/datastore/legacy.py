"""Import the datastores of other kNN-LM programs, and leave their mistakes behind.

Two mistakes are common. Arrays were allocated for more rows than the corpus had, so they end in
all-zero rows that vote for token 0 and lie near every query of small norm. And token ids were
kept as int16, which overflows past 32,767. The tail is dropped and reported; overflow is an error
that says how to undo it.

The rows are copied, not referred to: a datastore owns its files, cuts them into shards and knows
their checksums, none of which holds for files that another program may still write to.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from knnext.datastore.copy import chunk_rows
from knnext.datastore.errors import DatastoreError
from knnext.datastore.legacy_files import Array, LegacyFiles, find_files
from knnext.datastore.meta import INT32_MAX, Origin
from knnext.datastore.verify import Progress
from knnext.datastore.writer import DatastoreWriter
from knnext.errors import KnnextWarning

_SCAN_ROWS = 1 << 16


class LegacyRows:
    """The rows of another program's files, found and counted; nothing is read into memory.

    Read are the raw memory maps of urvashik/knnlm and knnlm-why (``PREFIX_keys.npy``,
    ``PREFIX_vals.npy``), of knn-transformers and knnlm-limits (``dstore_MODEL_N_D_keys.npy``), and
    real .npy files under such names. FAISS indexes beside them are noted, not read.

    Args:
        source: ``PREFIX_keys.npy``, ``PREFIX``, or a folder with one such file.
        num_entries, dim, key_dtype, value_dtype: of the arrays in the files (the ``--dstore-size``
            of the program that wrote them), where name and sizes leave a choice.
        num_valid: rows to take, where known. By default all but the all-zero tail.
        unwrap_int16: add 65,536 to negative int16 ids; needs ``vocab_size`` <= 65,536.
        vocab_size: of the model whose tokens the values are, where known.

    Raises:
        DatastoreError: no reading, or more than one, fits the files; ids overflowed.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        num_entries: int | None = None,
        dim: int | None = None,
        key_dtype: torch.dtype | None = None,
        value_dtype: torch.dtype | None = None,
        num_valid: int | None = None,
        unwrap_int16: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self.files = files = find_files(
            source, num_entries=num_entries, dim=dim, key_dtype=key_dtype, value_dtype=value_dtype
        )
        self.num_entries = count_valid(files.keys, files.values)
        if num_valid is not None:
            if not 0 <= num_valid <= len(files.keys):
                raise ValueError(
                    f"num_valid: got {num_valid}, the files hold {len(files.keys)} rows"
                )
            self.num_entries = num_valid
        _check_ids(files, self.num_entries, vocab_size, unwrap_int16)

    @property
    def dim(self) -> int:
        return self.files.dim

    @property
    def key_dtype(self) -> torch.dtype:
        return self.files.key_dtype

    @property
    def dropped(self) -> int:
        """Rows of the files that are not taken."""
        return len(self.files.keys) - self.num_entries

    @property
    def origin(self) -> Origin:
        """What was found and dropped, for ``meta.origin``."""
        return _origin(self.files, self.dropped)

    def append_to(self, target: DatastoreWriter, progress: Progress | None = None) -> None:
        """Append what ``target`` still lacks, and warn of what was dropped or looks wrong."""
        zeros = _copy(target, self.files, self.num_entries, progress)
        _report(self.files, self.num_entries, self.dropped, zeros)


def count_valid(keys: Array, values: Array) -> int:
    """Rows before the tail in which both key and value are all zero."""
    rows = _last_nonzero(values, len(values))
    # Only rows after the last nonzero value can be of the tail: few keys are read.
    for stop in range(len(keys), rows, -_SCAN_ROWS):
        start = max(rows, stop - _SCAN_ROWS)
        used = _bits(keys[start:stop]).any(axis=1)
        if used.any():
            return start + int(np.flatnonzero(used)[-1]) + 1
    return rows


def _bits(keys: Array) -> Array:
    """As unsigned integers, whose zeros are found much faster than those of halves."""
    return keys.view(f"u{keys.itemsize}")


def _last_nonzero(values: Array, count: int) -> int:
    block = _SCAN_ROWS * 16
    for stop in range(count, 0, -block):
        start = max(0, stop - block)
        nonzero = np.flatnonzero(values[start:stop])
        if len(nonzero):
            return start + int(nonzero[-1]) + 1
    return 0


def _check_ids(files: LegacyFiles, rows: int, vocab_size: int | None, unwrap: bool) -> None:
    narrow = files.values.itemsize == 2
    if unwrap and not (narrow and vocab_size is not None and vocab_size <= 1 << 16):
        raise ValueError(
            f"unwrap_int16: the values are {files.values.dtype} and vocab_size is {vocab_size}; "
            "want int16 and a vocab_size of at most 65,536"
        )
    if unwrap or not rows:
        return
    low, high = int(files.values[:rows].min()), int(files.values[:rows].max())
    if narrow and (low < 0 or (vocab_size or 0) > 1 << 15):
        raise DatastoreError(
            f"{files.values_path}: token ids are int16, which overflows past 32,767 (smallest id "
            f"{low}, vocab_size {vocab_size}). If the vocabulary has at most 65,536 tokens, pass "
            "vocab_size and unwrap_int16=True to recover them; else they are lost: build anew"
        )
    limit = INT32_MAX if vocab_size is None else vocab_size - 1
    if low < 0 or high > limit:
        raise DatastoreError(
            f"{files.values_path}: token ids run from {low} to {high}, want [0, {limit}]; "
            "dtype, sizes or vocab_size are not those of these files"
        )


def _copy(target: DatastoreWriter, files: LegacyFiles, rows: int, progress: Progress | None) -> int:
    """Append what ``target`` still lacks; count the all-zero rows among it."""
    zeros = 0
    step = chunk_rows(files.keys.itemsize * files.dim)
    for start in range(target.num_entries, rows, step):
        stop = min(start + step, rows)
        keys = np.array(files.keys[start:stop])
        ids = _token_ids(files.values[start:stop])
        unlikely = np.flatnonzero(ids == 0)
        zeros += int((~_bits(keys[unlikely]).any(axis=1)).sum())
        target.append(keys, ids, start=start)
        if progress is not None:
            progress(stop, rows)
    return zeros


def _token_ids(values: Array) -> NDArray[np.int64]:
    ids = values.astype(np.int64)
    # Negative ids are left only where unwrap_int16 was asked for.
    return np.where(ids < 0, ids + (1 << 16), ids)


def _origin(files: LegacyFiles, dropped: int) -> Origin:
    origin: dict[str, str | int] = {
        "format": files.format,
        "keys": files.keys_path.name,
        "values": files.values_path.name,
        "rows_in_files": len(files.keys),
        "dropped_rows": dropped,
    }
    if files.faiss_index is not None:
        origin["faiss_index_not_imported"] = files.faiss_index
    return origin


def _report(files: LegacyFiles, rows: int, dropped: int, zeros: int) -> None:
    if dropped:
        warnings.warn(
            f"{files.keys_path.name}: left out {dropped:,} of {len(files.keys):,} rows, the "
            f"all-zero or unwanted tail; imported {rows:,}",
            KnnextWarning,
            stacklevel=4,
        )
    if zeros:
        warnings.warn(
            f"{files.keys_path.name}: {zeros:,} all-zero rows with token 0 lie before the end and "
            "were imported; they are near every query of small norm",
            KnnextWarning,
            stacklevel=4,
        )
