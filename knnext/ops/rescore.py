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
        (Q, m) float32; +inf at padding. The backward holds a few buffers of 64 MB; its sums into
        keys that several queries name are of no fixed order on CUDA.

    Raises:
        RuntimeError: on a bad argument, naming it; on the CPU also on an index outside [-1, N),
            which on CUDA stops the kernel with a device-side assertion.
    """
    return torch.ops.knnext.rescore(queries, keys, indices, metric)


@torch.library.register_fake("knnext::rescore")
def _fake(queries: Tensor, keys: Tensor, indices: Tensor, metric: str = "l2") -> Tensor:
    _checks.rescore(queries, keys, indices, metric)
    return queries.new_empty(indices.shape, dtype=torch.float32)


# Rows of keys that the backward holds at once, in float32.
_BACKWARD_BYTES = 64 << 20


@torch.library.custom_op("knnext::_rescore_backward", mutates_args=())
def _rescore_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, indices: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys. An op of its own, so that torch.compile sees no loop in it."""
    dim, width = keys.shape[1], indices.shape[1]
    grad_queries = torch.zeros_like(queries, dtype=torch.float32)
    grad_keys = torch.zeros_like(keys, dtype=torch.float32)
    step = max(1, _BACKWARD_BYTES // (4 * dim * max(1, width)))
    for start in range(0, queries.shape[0] if keys.shape[0] else 0, step):
        part = slice(start, start + step)
        named = indices[part]
        weight = grad[part].float().masked_fill(named < 0, 0.0)[:, :, None]
        rows = named.clamp_min(0).reshape(-1)
        x = keys[rows].float().view(*named.shape, dim)
        q = queries[part].float()[:, None, :]
        if metric == "l2":
            # d/dq sum (q - x)^2 = 2 (q - x); the key's gradient is its negative.
            to_queries = 2 * weight * (q - x)
            to_keys = -to_queries
        else:
            to_queries, to_keys = -weight * x, -weight * q
        # A row that weighs nothing gives nothing, also where it holds inf or NaN.
        to_queries = to_queries.masked_fill(weight == 0, 0.0)
        to_keys = to_keys.masked_fill(weight == 0, 0.0)
        grad_queries[part] = to_queries.sum(1)
        grad_keys.index_add_(0, rows, to_keys.reshape(-1, dim))
    return grad_queries.to(queries.dtype), grad_keys.to(keys.dtype)


@_rescore_backward.register_fake
def _fake_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, indices: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), torch.empty_like(keys)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    queries, keys, indices, ctx.metric = inputs
    ctx.save_for_backward(queries, keys, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad_queries, grad_keys = _rescore_backward(grad, *ctx.saved_tensors, ctx.metric)
    return grad_queries, grad_keys, None, None


torch.library.register_autograd("knnext::rescore", _backward, setup_context=_setup_context)
