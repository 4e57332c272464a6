"""Real scores on a given set of neighbors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks


def rescore(queries: Tensor, keys: Tensor, indices: Tensor, metric: str = "l2") -> Tensor:
    """Distances of each query to the keys named, computed directly in float32.

    ``"l2"``: ``sum((q - x)^2)``, exact 0 for identical rows; ``"ip"``: ``-sum(q x)``. It gives the
    real score on an approximate mask. Differentiable in queries and keys.

    Args:
        queries: (Q, D) float16, bfloat16 or float32.
        keys: (N, D) of the same dtype.
        indices: (Q, m) int64 rows of ``keys``; -1 is padding.
        metric: ``"l2"`` or ``"ip"``.

    Returns:
        (Q, m) float32; +inf at padding.
    """
    return torch.ops.knnext.rescore(queries, keys, indices, metric)


@torch.library.register_fake("knnext::rescore")
def _fake(queries: Tensor, keys: Tensor, indices: Tensor, metric: str = "l2") -> Tensor:
    _checks.rescore(queries, keys, indices, metric)
    return queries.new_empty(indices.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    queries, keys, indices, ctx.metric = inputs
    ctx.save_for_backward(queries, keys, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    queries, keys, indices = ctx.saved_tensors
    if keys.shape[0] == 0:
        return torch.zeros_like(queries), torch.zeros_like(keys), None, None
    weight = grad.masked_fill(indices < 0, 0.0)
    safe = indices.clamp_min(0)
    rows = keys[safe].to(grad.dtype)
    q = queries.to(grad.dtype)
    if ctx.metric == "l2":
        # d/dq sum (q - x)^2 = 2 (q - x); the key's gradient is its negative.
        toward = 2 * weight[:, :, None] * (q[:, None, :] - rows)
        grad_queries, per_row = toward.sum(1), -toward
    else:
        grad_queries = -(weight[:, :, None] * rows).sum(1)
        per_row = -weight[:, :, None] * q[:, None, :]
    grad_keys = torch.zeros_like(keys, dtype=grad.dtype)
    grad_keys = grad_keys.index_add(0, safe.reshape(-1), per_row.reshape(-1, keys.shape[1]))
    return grad_queries.to(queries.dtype), grad_keys.to(keys.dtype), None, None


torch.library.register_autograd("knnext::rescore", _backward, setup_context=_setup_context)
