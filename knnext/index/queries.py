"""What both indexes ask of their arguments: valid queries, grouped by what they may find."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knnext.index.row_set import RowSet
from knnext.index.tensors import as_tensor, normalised

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


class QueryGroup(NamedTuple):
    """Queries that may find the same rows.

    Attributes:
        queries: (n,) int64 rows of the query batch, or None for all of them.
        kept: the rows of the datastore that they may find.
    """

    queries: Tensor | None
    kept: RowSet
