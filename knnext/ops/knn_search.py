"""Exact k-nearest-neighbor search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks, _numbers
from knnext.ops._derivatives import as_rows, call, one_by_one, register_no_derivative
from knnext.ops.encode_keys import KeyCodes


def knn_search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str = "l2",
    *,
    key_sqnorms: Tensor | None = None,
    index_offset: int = 0,
    init_distances: Tensor | None = None,
    init_indices: Tensor | None = None,
    refine: bool = False,
    codes: KeyCodes | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest keys of each query, exactly, without ever making the (Q, N) matrix.

    Products are accumulated in float32. Results are in order of (distance, index): equal distances
    come with the lower index first, so neither chunking nor sharding changes the answer.

    Args:
        queries: (Q, D) float16, bfloat16 or float32.
        keys: (N, D) of the same dtype.
        k: neighbors a query, any k >= 1 (CUDA: up to 16,384); beyond N the tail is padding.
        metric: ``"l2"``, squared Euclidean distance, or ``"ip"``, the negated inner product:
            smaller is nearer in both.
        key_sqnorms: (N,) float32 from :func:`knnext.key_sqnorms`, to spare computing them again.
        index_offset: added to the row numbers of ``keys``; for one chunk or shard of many.
        init_distances, init_indices: (Q, m) float32 and int64, an earlier result to go on from.
        refine: choose and order by distances computed directly, as :func:`knnext.rescore` does
            ("l2": by subtraction), so that identical rows meet at exactly 0 and keys far from the
            origin are told apart. The expanded form is good to about 1e-6 (|q|^2 + |x|^2), and
            from float16 and bfloat16 on CUDA to 2e-5 max(1, D / 1024) of that; where that leaves
            a query's neighbors open, every key is computed directly.
        codes: of these very keys, from :func:`knnext.encode_keys`. All are scored by their codes,
            with a bound that holds always, and those that could be among the k nearest again
            from ``keys``: less work, and the same bits. Beside queries and codes on a GPU, keys
            may then lie on the CPU. Codes of other keys give wrong neighbors.

    Returns:
        distances (Q, k) float32 and indices (Q, k) int64; +inf and -1 are padding. A key that
        holds NaN, or lies at an infinite distance (to either side), is never returned; a query
        that holds NaN finds none, and keeps what it came with. No gradient: to differentiate,
        :func:`knnext.rescore` the indices.

    Raises:
        RuntimeError: on a bad argument, naming it, what was given and what is wanted.
    """
    if type(k) is not int:
        k = _numbers.integer("knn_search", "k", k)
    if type(index_offset) is not int:
        index_offset = _numbers.integer("knn_search", "index_offset", index_offset)
    if codes is not None:
        return call(
            _BY_CODES,
            queries,
            keys,
            codes.codes,
            codes.stats,
            codes.center,
            k,
            metric,
            key_sqnorms=key_sqnorms,
            index_offset=index_offset,
            init_distances=init_distances,
            init_indices=init_indices,
            refine=refine,
        )
    usual = key_sqnorms is None and init_distances is None and init_indices is None
    if usual and not refine and not index_offset:  # what is not passed costs no time
        return call(_OP, queries, keys, k, metric)
    return call(
        _OP,
        queries,
        keys,
        k,
        metric,
        key_sqnorms=key_sqnorms,
        index_offset=index_offset,
        init_distances=init_distances,
        init_indices=init_indices,
        refine=refine,
    )


_OP = torch.ops.knnext.knn_search.default
_BY_CODES = torch.ops.knnext.knn_search_codes.default


@torch.library.register_fake("knnext::knn_search")
def _fake(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str = "l2",
    *,
    key_sqnorms: Tensor | None = None,
    index_offset: int = 0,
    init_distances: Tensor | None = None,
    init_indices: Tensor | None = None,
    refine: bool = False,
) -> tuple[Tensor, Tensor]:
    _checks.knn_search(
        queries,
        keys,
        k,
        metric,
        key_sqnorms=key_sqnorms,
        index_offset=index_offset,
        init_distances=init_distances,
        init_indices=init_indices,
        refine=refine,
    )
    shape = (queries.shape[0], k)
    distances = queries.new_empty(shape, dtype=torch.float32)
    return distances, queries.new_empty(shape, dtype=torch.int64)


def _vmap(run: Any, batch: int, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    shared = (1, 4)  # keys, key_sqnorms
    if any(in_dims[place] is not None for place in shared):
        return one_by_one(run, batch, in_dims, *args)
    return as_rows(run, batch, in_dims, *args, shared=shared)


register_no_derivative("knn_search", _vmap)
