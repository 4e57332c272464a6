"""What both indexes ask of their arguments: valid queries, and rows that must not be found."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knnext.index.tensors import DocumentBounds, as_tensor, normalised

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Range = tuple[int, int]


def prepare_queries(queries: Any, dim: int, dtype: torch.dtype, *, cosine: bool = False) -> Tensor:
    """Check (Q, dim) queries, a tensor or a numpy array, and round them to the keys' dtype.

    The keys were rounded when they were stored. A query rounded the same way meets its own key at
    distance zero, and exact and approximate search see one and the same vector. With ``cosine``
    they are made of length 1 before, as those keys were; zeros stay zeros.
    """
    queries = as_tensor("queries", queries)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(
            f"queries must be (Q, {dim}) like the datastore's keys, got {tuple(queries.shape)}"
        )
    if queries.dtype not in FLOAT_DTYPES:
        raise TypeError(f"queries must be floating point, got {queries.dtype}")
    return (normalised(queries.float()) if cosine else queries).to(dtype)


def as_distances(scores: Tensor, *, cosine: bool) -> Tensor:
    """Of ``cosine`` 1 - cos, from 0 to 2, where the search gave -cos; padding stays +inf."""
    if not cosine:
        return scores
    found = scores + 1
    # Keys and queries of length 1 are so up to their dtype's rounding.
    return torch.where(found.isinf(), found, found.clamp(0, 2))


def check_k(k: int) -> int:
    """k as an int; refuses k < 1. Any other is legal, past the number of entries it pads."""
    return check_count("k", k)


def check_count(name: str, value: int) -> int:
    """A whole number of at least 1 of any type, numpy's too, as an int."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return count


@dataclass(frozen=True)
class QueryGroup:
    """Queries that share the rows they must not find.

    Attributes:
        queries: (n,) int64 rows of the query batch, or None for all of them.
        excluded: row ranges `[start, stop)` of the datastore, ascending and disjoint.
    """

    queries: Tensor | None
    excluded: tuple[Range, ...]

    def touches(self, start: int, stop: int) -> bool:
        """Whether an excluded range overlaps `[start, stop)`."""
        return any(a < stop and start < b for a, b in self.excluded)

    def allowed(self, start: int, stop: int) -> list[Range]:
        """The parts of `[start, stop)` that are not excluded, in order."""
        parts, at = [], start
        for a, b in self.excluded:
            if b <= at or a >= stop:
                continue
            if a > at:
                parts.append((at, a))
            at = max(at, b)
        if at < stop:
            parts.append((at, stop))
        return parts


def group_queries(
    exclude_documents: Tensor | Sequence[int] | None,
    document_offsets: Tensor | DocumentBounds,
    num_queries: int,
) -> list[QueryGroup]:
    """Sort queries into groups by what they exclude.

    Args:
        exclude_documents: None; an integer tensor (Q,) of one document id a query, -1 for none;
            or a sequence of document ids that no query may find.
        document_offsets: (documents + 1,) int64 row bounds of the documents.
        num_queries: Q.
    """
    if num_queries == 0:
        return []
    if exclude_documents is None:
        return [QueryGroup(None, ())]
    num_documents = max(document_offsets.numel() - 1, 0)
    if num_documents == 0:
        raise ValueError("exclude_documents was given, but the datastore has no documents")
    if not isinstance(exclude_documents, Tensor):
        ids = sorted({int(document) for document in exclude_documents})
        _check_documents(ids, num_documents, lowest=0)
        return [QueryGroup(None, _merge([_rows_of(d, document_offsets) for d in ids]))]
    documents = _check_per_query(exclude_documents, num_queries)
    order = documents.argsort(stable=True)
    ids_present, counts = documents[order].unique_consecutive(return_counts=True)
    _check_documents(ids_present.tolist(), num_documents, lowest=-1)
    if ids_present.numel() == 1:
        return [QueryGroup(None, _excluded_rows(int(ids_present[0]), document_offsets))]
    return [
        QueryGroup(rows, _excluded_rows(document, document_offsets))
        for document, rows in zip(ids_present.tolist(), order.split(counts.tolist()), strict=True)
    ]


def _check_per_query(documents: Tensor, num_queries: int) -> Tensor:
    if documents.dtype.is_floating_point or documents.dtype in (torch.bool, torch.complex64):
        raise TypeError(f"exclude_documents must hold integers, got {documents.dtype}")
    if documents.shape != (num_queries,):
        raise ValueError(
            f"exclude_documents as a tensor must be ({num_queries},), one document id a query, "
            f"got {tuple(documents.shape)}"
        )
    return documents.detach().to("cpu", torch.int64)


def _check_documents(ids: list[int], num_documents: int, *, lowest: int) -> None:
    for document in ids:
        if not lowest <= document < num_documents:
            raise ValueError(
                f"exclude_documents must hold ids from {lowest} to {num_documents - 1}, "
                f"got {document}"
            )


def _rows_of(document: int, document_offsets: Tensor | DocumentBounds) -> Range:
    return int(document_offsets[document]), int(document_offsets[document + 1])


def _excluded_rows(document: int, document_offsets: Tensor | DocumentBounds) -> tuple[Range, ...]:
    return () if document < 0 else _merge([_rows_of(document, document_offsets)])


def _merge(ranges: list[Range]) -> tuple[Range, ...]:
    """Ascending ranges with neighbors joined and empty ones dropped."""
    merged: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)
