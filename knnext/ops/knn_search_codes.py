"""The op behind ``knn_search(..., codes=...)``: its fake, its rules, and where it runs on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks
from knnext.ops._derivatives import as_rows, one_by_one, register_no_derivative

OP = torch.ops.knnext.knn_search_codes.default


@torch.library.register_fake("knnext::knn_search_codes")
def _fake(
    queries: Tensor,
    keys: Tensor,
    codes: Tensor,
    code_stats: Tensor,
    center: Tensor,
    k: int,
    metric: str = "l2",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    _checks.knn_search_codes(queries, keys, codes, code_stats, center, k, metric, **options)
    shape = (queries.shape[0], k)
    distances = queries.new_empty(shape, dtype=torch.float32)
    return distances, queries.new_empty(shape, dtype=torch.int64)


def _vmap(run: Any, batch: int, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    shared = (1, 2, 3, 4, 7)  # keys, codes, code_stats, center, key_sqnorms
    if any(in_dims[place] is not None for place in shared):
        return one_by_one(run, batch, in_dims, *args)
    return as_rows(run, batch, in_dims, *args, shared=shared)


register_no_derivative("knn_search_codes", _vmap)
