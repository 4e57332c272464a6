"""What may be appended: every check on keys, values and documents, before a byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.datastore.documents import DocumentRuns, check_runs, drop_rows
from knnext.datastore.meta import INT32_MAX, DatastoreMeta

ArrayLike: TypeAlias = Tensor | NDArray[Any]
Documents: TypeAlias = Tensor | NDArray[np.integer[Any]] | Sequence[int] | DocumentRuns

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Batch:
    """Checked rows: keys (n, dim) and values (n,) as they go to disk, documents as ids or runs."""

    keys: Tensor
    values: NDArray[np.int32]
    ids: NDArray[np.int64] | None
    runs: list[tuple[str, int]] | None

    def __len__(self) -> int:
        return len(self.values)

    def drop(self, count: int) -> Batch:
        """The batch without its first ``count`` rows."""
        return Batch(
            self.keys[count:],
            self.values[count:],
            None if self.ids is None else self.ids[count:],
            None if self.runs is None else drop_rows(self.runs, count),
        )


def check_batch(
    meta: DatastoreMeta, keys: ArrayLike, values: ArrayLike, documents: Documents | None, row: int
) -> Batch:
    """A :class:`Batch` of rows ``row`` and on; TypeError or ValueError naming the bad row."""
    checked_keys = _check_keys(meta, keys, row)
    checked_values = _check_values(meta, values, len(checked_keys), row)
    ids, runs = _check_documents(documents, len(checked_keys))
    return Batch(checked_keys, checked_values, ids, runs)


def _check_keys(meta: DatastoreMeta, keys: ArrayLike, row: int) -> Tensor:
    given = torch.from_numpy(keys) if isinstance(keys, np.ndarray) else keys
    if not isinstance(given, Tensor) or given.dtype not in _FLOATS:
        what = given.dtype if isinstance(given, Tensor) else type(keys).__name__
        raise TypeError(f"keys: got {what}, want a float tensor or array (n, {meta.dim})")
    if given.dim() != 2 or given.shape[1] != meta.dim:
        raise ValueError(f"keys: got shape {tuple(given.shape)}, want (n, {meta.dim})")
    stored = given.detach().to("cpu", meta.dtype).contiguous()
    # The extremes carry any NaN or infinity, at 20 times the speed of isfinite on halves.
    if stored.numel() and not all(bound.isfinite() for bound in stored.aminmax()):
        bad = int(torch.nonzero(~stored.isfinite().all(dim=1))[0])
        fits = bool(given[bad].isfinite().all())
        reason = f"does not fit {meta.dtype}" if fits else "holds NaN or infinity"
        raise ValueError(f"keys: row {row + bad} ({bad} of this call) {reason}")
    return stored


def _check_values(
    meta: DatastoreMeta, values: ArrayLike, count: int, row: int
) -> NDArray[np.int32]:
    given = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if given.dtype.kind not in "iu":
        raise TypeError(f"values: got dtype {given.dtype}, want integers")
    if given.shape != (count,):
        raise ValueError(f"values: got shape {given.shape}, want ({count},), one for each key")
    limit = INT32_MAX + 1 if meta.vocab_size is None else meta.vocab_size
    if count and not (int(given.min()) >= 0 and int(given.max()) < limit):
        bad = int(np.flatnonzero((given < 0) | (given >= limit))[0])
        raise ValueError(
            f"values: row {row + bad} ({bad} of this call) is {given[bad]}, "
            f"want a token id in [0, {limit})"
        )
    return np.ascontiguousarray(given, dtype="<i4")


def _check_documents(
    documents: Documents | None, count: int
) -> tuple[NDArray[np.int64] | None, list[tuple[str, int]] | None]:
    if documents is None:
        return None, None
    if not isinstance(documents, Tensor | np.ndarray):
        first = documents[0] if len(documents) else None
        if not isinstance(first, int | np.integer):
            return None, check_runs(documents, count)
    ids = np.asarray(documents.cpu() if isinstance(documents, Tensor) else documents)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"documents: got dtype {ids.dtype}, want integer ids")
    if ids.shape != (count,):
        raise ValueError(f"documents: got shape {ids.shape}, want ({count},), one for each key")
    if count and int(ids.max()) > 2**62:
        raise ValueError(f"documents: got id {ids.max()}, want documents numbered from 0")
    return ids.astype(np.int64), None
