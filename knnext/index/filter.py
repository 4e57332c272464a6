"""What a search may find: a mask, rows, documents, "not itself", in one object for every index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from knnext.datastore.documents import ids_and_names
from knnext.index.row_set import Masked, RowSet, Runs
from knnext.index.tensors import as_tensor

if TYPE_CHECKING:
    from knnext.datastore import Datastore

Documents: TypeAlias = "Tensor | Sequence[int | str]"
Part: TypeAlias = "Runs | Masked"


@dataclass(frozen=True, eq=False)
class Filter:
    """Which rows of a datastore the queries of a search may find; what is left out weighs nothing.

    The result is that of a datastore without the other rows, with their numbers as they are: in
    exact search to the last bit. Everything that is given must hold. Row numbers and documents are
    those of the index's `datastore`.

    Attributes:
        mask: (N,) bool for all queries, or (Q, N) of each; a tensor or an array, copied.
        rows: row numbers that alone may be found.
        exclude_rows: row numbers that no query may find.
        documents: ids or names of the documents that alone may be found, for all queries; or an
            integer tensor (Q,) of one document a query, -1 for any.
        exclude_documents: likewise of those that may not be found.
        own_rows: (Q,) the row that each query itself is, which it must not find; -1 for none.
    """

    mask: Any = None
    rows: Any = None
    exclude_rows: Any = None
    documents: Documents | None = None
    exclude_documents: Documents | None = None
    own_rows: Any = None
    _known: list[Any] = field(default_factory=list, repr=False, init=False)

    def __post_init__(self) -> None:
        if self.mask is not None:
            object.__setattr__(self, "mask", _mask(self.mask))
        for name in ("rows", "exclude_rows", "own_rows"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _row_numbers(name, getattr(self, name)))
        for name in ("documents", "exclude_documents"):
            given = getattr(self, name)
            if isinstance(given, Tensor):
                object.__setattr__(self, name, _per_query(name, given))
            elif given is not None:
                several = isinstance(given, Iterable) and not isinstance(given, str)
                kept = tuple(given) if several else given
                ids_and_names(name, kept)  # an error now, where it is no list of them
                object.__setattr__(self, name, kept)

    @property
    def per_query(self) -> list[str]:
        """Names of what it says of each query alone."""
        found = [n for n in ("documents", "exclude_documents") if _is_tensor(getattr(self, n))]
        found += ["mask"] if self.mask is not None and self.mask.ndim == 2 else []
        return found + (["own_rows"] if self.own_rows is not None else [])

    def shared(self, datastore: Datastore) -> RowSet:
        """The rows that it leaves to all queries, whatever it says of each."""
        # Of a datastore that has changed since, rows and documents are others.
        state = (datastore.num_entries, getattr(datastore, "generation", 0))
        for store, then, found in self._known:
            if store() is datastore and then == state:
                return cast("RowSet", found)
        made = RowSet(self._shared_parts(datastore))
        self._known[:] = [*self._known[-3:], (ref(datastore), state, made)]
        return made

    def left_out(self, datastore: Datastore) -> list[int]:
        """Ids of the documents of which it leaves no row to any query."""
        kept, bounds = self.shared(datastore), datastore.document_offsets.numpy()
        gone = bounds[:-1] < bounds[1:]
        for rows in kept.numbers(datastore.num_entries):
            gone[np.searchsorted(bounds, rows, side="right") - 1] = False
        return [int(d) for d in np.flatnonzero(gone)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": []}

    def _shared_parts(self, datastore: Datastore) -> list[Part]:
        count = datastore.num_entries
        parts: list[Part] = []
        if self.mask is not None and self.mask.ndim == 1:
            check_width(self.mask, count)
            parts.append(Masked(self.mask))
        for name, keep in (("rows", True), ("exclude_rows", False)):
            if (rows := getattr(self, name)) is not None:
                check_rows(name, rows, count, lowest=0)
                parts.append(Runs.of_rows(rows, keep=keep))
        for name, keep in (("documents", True), ("exclude_documents", False)):
            given = getattr(self, name)
            if given is not None and not _is_tensor(given):
                parts.append(document_runs(name, given, datastore, keep=keep))
        return parts


def document_runs(
    name: str, documents: Iterable[int | str], datastore: Datastore, *, keep: bool
) -> Runs:
    """The rows of documents, by id or name; ValueError for those that are not there."""
    ids = torch.tensor(document_ids(name, documents, datastore), dtype=torch.int64, device="cpu")
    bounds = datastore.document_offsets
    return Runs.of(torch.stack([bounds[ids], bounds[ids + 1]], dim=1).numpy(), keep=keep)


def document_ids(name: str, documents: Iterable[int | str], datastore: Datastore) -> list[int]:
    """Ids of documents, ascending: a name stands for every document that is called so."""
    count = num_documents(name, datastore)
    ids, wanted = ids_and_names(name, documents)
    check_documents(name, sorted(ids), count, lowest=0)
    if wanted:
        names = getattr(datastore, "document_names", None)
        if names is None:
            raise ValueError(f"{name}: tensors have no names of documents; give their ids")
        found = {d: one for d, one in enumerate(names) if one in wanted}
        if "" in wanted:  # which deleted documents are called, too
            bounds = datastore.document_offsets
            found = {d: one for d, one in found.items() if one or bounds[d] < bounds[d + 1]}
        if missing := sorted(wanted - set(found.values())):
            more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{name}: {datastore.path} has no document called {missing[0]!r}{more}; "
                f"it has {count:,}, such as {names[0]!r}"
            )
        ids |= set(found)
    return sorted(ids)


def num_documents(name: str, datastore: Datastore) -> int:
    count = max(datastore.document_offsets.numel() - 1, 0)
    if count == 0:
        raise ValueError(f"{name} was given, but the datastore has no documents")
    return count


def check_documents(name: str, ids: list[int], num_documents: int, *, lowest: int) -> None:
    for document in ids:
        if not lowest <= document < num_documents:
            raise ValueError(
                f"{name} must hold ids from {lowest} to {num_documents - 1}, got {document}"
            )


def _per_query(name: str, documents: Tensor) -> Tensor:
    if documents.dtype.is_floating_point or documents.dtype in (torch.bool, torch.complex64):
        raise TypeError(f"{name} must hold integers, got {documents.dtype}")
    if documents.ndim != 1:
        raise ValueError(
            f"{name} as a tensor must be (Q,), one document id a query, "
            f"got {tuple(documents.shape)}"
        )
    return documents.detach().to("cpu", torch.int64)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _mask(given: Any) -> Any:
    tensor = as_tensor("mask", given)
    if tensor.dtype != torch.bool or tensor.ndim not in (1, 2):
        raise TypeError(
            f"mask must be bool, (N,) or (Q, N), got {tensor.dtype} of {tuple(tensor.shape)}; "
            "row numbers are rows="
        )
    return tensor.to("cpu", copy=True).contiguous().numpy()


def _row_numbers(name: str, given: Any) -> Any:
    array = np.array(given.detach().cpu().numpy() if isinstance(given, Tensor) else given)  # a copy
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        hint = "; a mask is mask=" if array.dtype.kind == "b" else ""
        raise TypeError(
            f"{name} must be row numbers (n,), got {array.dtype} of {array.shape}{hint}"
        )
    return array.astype(np.int64)


def check_rows(name: str, rows: Any, count: int, *, lowest: int) -> None:
    if len(rows) and not lowest <= int(rows.min()) <= int(rows.max()) < count:
        raise ValueError(
            f"{name} must lie in [{lowest}, {count}), got {int(rows.min())} to {int(rows.max())}"
        )


def check_width(mask: Any, count: int) -> None:
    if mask.shape[-1] != count:
        raise ValueError(f"mask must tell of {count:,} rows, one each, got {mask.shape[-1]:,}")
