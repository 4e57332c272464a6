"""Indexes: where the k nearest keys of a query are found.

`ExactIndex` finds what comparing with every key would, by `StoredCodes` where there are some;
`FaissIndex` asks an approximate index built with FAISS; `ShardedIndex` divides the rows of either
among processes. A caller need not know which of them it holds: each is an `Index`.
"""

from __future__ import annotations

from knnext.errors import IndexMismatchError
from knnext.index.base import Index
from knnext.index.codes import StoredCodes
from knnext.index.exact import ExactIndex
from knnext.index.exactness import ExactnessReport, check_exactness
from knnext.index.faiss import FaissIndex
from knnext.index.filter import Filter
from knnext.index.sharded import ShardedIndex

__all__ = [
    "ExactIndex",
    "ExactnessReport",
    "FaissIndex",
    "Filter",
    "Index",
    "IndexMismatchError",
    "ShardedIndex",
    "StoredCodes",
    "check_exactness",
]
