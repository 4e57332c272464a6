"""Real scores on a given set of neighbors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks, _gradients, _tangents
from knnext.ops._derivatives import (
    as_rows,
    call,
    one_by_one,
    register_derivatives,
    register_gradient,
    saved_primals,
)


def rescore(queries: Tensor, keys: Tensor, indices: Tensor, metric: str = "l2") -> Tensor:
    """Distances of each query to the keys named, computed directly in float32.

    ``"l2"``: ``sum((q - x)^2)``, exact 0 for identical rows; ``"ip"``: ``-sum(q x)``. It gives the
    real score on an approximate mask. Differentiable in queries and keys.

    Args:
        queries: (Q, D) float16, bfloat16 or float32; on the CPU float64 too, for gradcheck.
        keys: (N, D) of the same dtype.
        indices: (Q, m) int64 rows of ``keys``; -1 is padding.
        metric: ``"l2"`` or ``"ip"``.

    Returns:
        (Q, m) float32 (float64 where the queries are); +inf at padding. The backward reads rows
        where they lie and sums them in a fixed order; what it holds beside its results is a sorted
        copy of ``indices``.

    Raises:
        RuntimeError: on a bad argument, naming it; on the CPU also on an index outside [-1, N),
            which on CUDA stops the kernel with a device-side assertion.
    """
    return call(_OP, queries, keys, indices, metric)


_OP = torch.ops.knnext.rescore.default
_GRADIENTS = torch.ops.knnext._rescore_gradients.default


@torch.library.register_fake("knnext::rescore")
def _fake(queries: Tensor, keys: Tensor, indices: Tensor, metric: str = "l2") -> Tensor:
    _checks.rescore(queries, keys, indices, metric)
    wide = queries.dtype == torch.float64
    return queries.new_empty(indices.shape, dtype=torch.float64 if wide else torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.metric = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    queries, keys, indices = ctx.saved_tensors
    need_queries, need_keys, *_ = ctx.needs_input_grad
    # What names one key lies together, in order of its place: each key is then summed by one
    # thread or block, always in this order.
    order = indices.reshape(-1).sort(stable=True).indices if need_keys else None
    to_queries, to_keys = call(
        _GRADIENTS, grad, queries, keys, indices, order, ctx.metric, need_queries
    )
    return to_queries if need_queries else None, to_keys if need_keys else None, None, None


def _jvp(ctx: Any, d_queries: Tensor | None, d_keys: Tensor | None, *_: Any) -> Tensor:
    queries, keys, indices = saved_primals(ctx)
    return _tangents.rescore(queries, keys, indices, ctx.metric, d_queries, d_keys)


def _vmap(run: Any, batch: int, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    if in_dims[1] is not None:
        return one_by_one(run, batch, in_dims, *args)
    return as_rows(run, batch, in_dims, *args, shared=(1,))


register_derivatives(
    "rescore", setup_context=_setup_context, backward=_backward, jvp=_jvp, vmap=_vmap
)


@torch.library.register_fake("knnext::_rescore_gradients")
def _fake_gradients(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    indices: Tensor,
    order: Tensor | None,
    metric: str,
    need_queries: bool,
) -> tuple[Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape[0] if need_queries else 0, queries.shape[1]),
        keys.new_empty(keys.shape[0] if order is not None else 0, keys.shape[1]),
    )


register_gradient("_rescore_gradients", _gradients.rescore)
