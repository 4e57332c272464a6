"""What one search asks for: its queries, in groups of those that may find the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from knnext.index.filter import (
    Documents,
    Filter,
    Part,
    check_documents,
    check_rows,
    check_width,
    num_documents,
)
from knnext.index.queries import QueryGroup
from knnext.index.row_set import ALL_ROWS, Masked, RowSet, Runs

if TYPE_CHECKING:
    from knnext.datastore import Datastore


class Wanted(NamedTuple):
    """What a search is asked for: queries by the rows they may find, and the row each one is."""

    groups: list[QueryGroup]
    own_rows: Tensor | None

    def more(self, k: int) -> int:
        """Neighbors to look for, of which `finish` keeps k."""
        return k if self.own_rows is None else k + 1

    def finish(self, distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(Q, k) of (Q, more(k)): without the row that each query is."""
        if self.own_rows is None:
            return distances, indices
        own = self.own_rows.to(indices.device)[:, None]
        itself = (indices == own) & (own >= 0)
        # From the place where it stands on, each is the next one.
        columns = torch.arange(k, device=indices.device) + itself[:, :k].cumsum(1)
        return distances.gather(1, columns), indices.gather(1, columns)


def wanted_rows(
    datastore: Datastore,
    num_queries: int,
    given: Filter | Sequence[Filter | None] | None,
    exclude_documents: Documents | None = None,
    always: Filter | None = None,
) -> Wanted:
    """Queries in groups of those that may find the same rows.

    Args:
        datastore: whose rows are searched.
        num_queries: Q.
        given: a filter for all queries, or a list of one for each.
        exclude_documents: as of a `Filter`.
        always: the filter that the index itself was given.
    """
    filters = [one for one in (always,) if one is not None]
    if exclude_documents is not None:
        filters.append(Filter(exclude_documents=exclude_documents))
    if given is None or isinstance(given, Filter):
        return _of_all(datastore, num_queries, [*filters, *([given] if given is not None else [])])
    own = _check_list(given, num_queries)
    base = _of_all(datastore, num_queries, filters)
    # Queries of one filter share a search.
    number = {id(one): n for n, one in enumerate(own)}
    labels = torch.tensor([number[id(one)] for one in own], dtype=torch.int64, device="cpu")
    columns = [_column(base.groups, num_queries), labels]
    parts = [
        [group.kept.parts for group in base.groups],
        [() if one is None else one.shared(datastore).parts for one in own],
    ]
    return Wanted(_grouped(columns, parts), base.own_rows)


def _of_all(datastore: Datastore, num_queries: int, filters: list[Filter]) -> Wanted:
    shared = [one.shared(datastore) for one in filters]
    own: Tensor | None = None
    columns: list[Tensor] = []
    parts: list[Any] = []
    for one in filters:
        for name in one.per_query:
            value = getattr(one, name)
            if len(value) != num_queries:
                what = "row numbers" if name == "own_rows" else "rows of a mask"
                what = "document id" if "documents" in name else what
                shape = "(Q, N)" if name == "mask" else "a tensor"
                raise ValueError(
                    f"{name} as {shape} must be ({num_queries},), one {what} a query, "
                    f"got {tuple(value.shape)}"
                )
            if name == "own_rows":
                check_rows(name, value, datastore.num_entries, lowest=-1)
                own = torch.from_numpy(value)
            elif name == "mask":
                check_width(value, datastore.num_entries)
                columns.append(torch.arange(num_queries, device="cpu"))
                parts.append(_LazyParts(lambda q, rows=value: (Masked(rows[q]),)))
            else:
                columns.append(value)
                parts.append(_documents_each(name, value, datastore))
    if not num_queries:
        return Wanted([], own)
    together = _both(shared)
    if not columns:
        return Wanted([QueryGroup(None, together)], own)
    groups = _grouped(columns, parts, together.parts)
    return Wanted(groups, own)


class _LazyParts:
    """Parts by label, made when they are asked for."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __getitem__(self, label: int) -> tuple[Part, ...]:
        found: tuple[Part, ...] = self._make(label)
        return found


def _both(sets: list[RowSet]) -> RowSet:
    held = [one for one in sets if not one.everything]
    if len(held) < 2:  # kept as it is, with what it has made of itself
        return held[0] if held else ALL_ROWS
    return RowSet([part for one in held for part in one.parts])


def _grouped(
    columns: list[Tensor], parts: list[Any], shared: tuple[Part, ...] = ()
) -> list[QueryGroup]:
    """Groups of the queries whose labels agree in all columns; ``parts[c][label]`` are theirs."""
    stacked = torch.stack(columns, dim=1)
    labels, inverse, counts = stacked.unique(dim=0, return_inverse=True, return_counts=True)
    order = inverse.argsort(stable=True)
    groups = []
    for row, queries in zip(labels.tolist(), order.split(counts.tolist()), strict=True):
        own = [part for c, label in enumerate(row) for part in parts[c][label]]
        kept = RowSet([*shared, *own]) if (shared or own) else ALL_ROWS
        groups.append(QueryGroup(None if len(labels) == 1 else queries, kept))
    return groups


def _column(groups: list[QueryGroup], num_queries: int) -> Tensor:
    """(Q,) the group of each query."""
    found = torch.zeros(num_queries, dtype=torch.int64, device="cpu")
    for number, group in enumerate(groups):
        if group.queries is not None:
            found[group.queries] = number
    return found


def _documents_each(name: str, labels: Tensor, datastore: Datastore) -> _LazyParts:
    """Of each query one document, or -1."""
    bounds, keep = datastore.document_offsets, name == "documents"
    check_documents(name, labels.unique().tolist(), num_documents(name, datastore), lowest=-1)

    def make(document: int) -> tuple[Part, ...]:
        if document < 0:
            return ()
        run = int(bounds[document]), int(bounds[document + 1])
        # A document without rows leaves nothing out.
        return (Runs.of([run], keep=keep),) if keep or run[0] < run[1] else ()

    return _LazyParts(make)


def _check_list(given: Any, num_queries: int) -> list[Filter | None]:
    found = list(given) if isinstance(given, list | tuple) else [given]
    wrong = [one for one in found if one is not None and not isinstance(one, Filter)]
    if wrong:
        raise TypeError(
            f"filter must be a Filter, or a list of one (or None) a query, got "
            f"{type(wrong[0]).__name__}"
        )
    if len(found) != num_queries:
        raise ValueError(
            f"filter: a list has one for each of {num_queries} queries, got {len(found)}"
        )
    for one in found:
        if one is not None and one.per_query:
            raise ValueError(
                f"filter: one of a list is of one query, and takes no {one.per_query[0]} of several"
            )
    return found
