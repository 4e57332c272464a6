"""usearch: its exhaustive search over the keys as they are, and over eight-bit ones.

It builds nothing: the keys are read where they lie, by as many threads as the call is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.data.search import Data, Result
from benchmarks.rivals.needs import load

#: Eight-bit values end here, both ways.
MOST = 127
_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


def exact(data: Data) -> Callable[[], Result]:
    """In the keys' own dtype."""
    module = load("usearch.index", "usearch")
    keys, queries = _array(data.keys), _array(data.queries)
    return _search(module, data, keys, queries, dtype=_NAMES[data.keys.dtype])


def exact_i8(data: Data) -> Callable[[], Result]:
    """Over keys rounded to int8 by one scale, the largest value at 127: approximate."""
    module = load("usearch.index", "usearch")
    scale = float(data.keys.abs().max()) / MOST
    keys = data.key_set.kept("usearch_i8", lambda: _rounded(data.keys, scale))
    found = _search(module, data, keys, _rounded(data.queries, scale), dtype="i8")

    def run() -> Result:
        distances, indices = found()
        return distances.mul_(scale * scale), indices

    return run


def _search(
    module: Any, data: Data, keys: Any, queries: Any, *, dtype: str
) -> Callable[[], Result]:
    given = {"exact": True, "threads": torch.get_num_threads(), "dtype": dtype}
    shape = (data.shape.queries, -1)

    def run() -> Result:
        found = module.search(keys, queries, data.k, module.MetricKind.L2sq, **given)
        indices = torch.from_numpy(found.keys.astype("int64"))
        return torch.from_numpy(found.distances).view(shape), indices.view(shape)

    return run


def _rounded(rows: Tensor, scale: float) -> Any:
    """Chunk by chunk: float32 copies of all keys may not fit."""
    out = torch.empty(rows.shape, dtype=torch.int8)
    for part, target in zip(rows.split(1 << 16), out.split(1 << 16), strict=True):
        target.copy_((part.float() / scale).round_().clamp_(-MOST, MOST))
    return out.numpy()


def _array(rows: Tensor) -> Any:
    """numpy has no bfloat16; usearch takes its bits and is told what they mean."""
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()
