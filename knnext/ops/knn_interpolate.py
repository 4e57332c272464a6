"""The mixture of the LM and its neighbors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks, _gradients, _mixing, _numbers, _tangents
from knnext.ops._derivatives import call, register_derivatives, register_gradient


def knn_interpolate(
    lm_logits: Tensor,
    distances: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    lmbda: float | Tensor,
) -> Tensor:
    """``log((1 - lmbda) softmax(lm_logits) + lmbda p_knn)``, from logits, in log space.

    lmbda = 0 is log_softmax of the logits. lmbda = 1 is log p_knn, -inf only where no neighbor has
    the token: a p_knn too small for float32 keeps its true logarithm. A row without a neighbor is
    the LM alone, whatever lmbda.

    Args:
        lm_logits: (Q, V) float16, bfloat16, float32 or float64.
        distances: (Q, k) float32 (float64 too on the CPU), smaller is nearer.
        tokens: (Q, k) int64 or int32 below V; -1 weighs nothing.
        temperature: above 0; a number, or a tensor () or (Q,).
        lmbda: weight of p_knn, in [0, 1]; a number, or a tensor () or (Q,).

    Returns:
        (Q, V) log-probabilities of the dtype of ``distances``. Differentiable in lm_logits,
        distances, tensor temperature and tensor lmbda.

    Raises:
        RuntimeError: on a bad argument, naming it, what was given and what is wanted. Values inside
            tensors are read where that costs no wait: on the CPU a token outside [-1, V), a
            tensor temperature not above 0 or a tensor lmbda outside [0, 1] raises too; on
            CUDA such a token stops the kernel with a device-side assertion, and such a
            parameter gives a row of NaN.
    """
    if type(temperature) is not float or type(lmbda) is not float:
        name = "knn_interpolate"
        temperature = _numbers.parameter(name, "temperature", temperature, distances)
        lmbda = _numbers.parameter(name, "lmbda", lmbda, distances)
        if isinstance(temperature, Tensor) or isinstance(lmbda, Tensor):
            temperature, lmbda = _mixing.both_tensors(temperature, lmbda, distances)
    # Not by the bool itself, which torch 2.10 does not compile.
    op = _OP[1 if isinstance(temperature, Tensor) else 0]
    return call(op, lm_logits, distances, tokens, temperature, lmbda)


_OP = (torch.ops.knnext.knn_interpolate.default, torch.ops.knnext.knn_interpolate.tensor)
_GRADIENTS = (
    torch.ops.knnext._knn_interpolate_gradients.default,
    torch.ops.knnext._knn_interpolate_gradients.tensor,
)


def _fake(
    lm_logits: Tensor,
    distances: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    lmbda: float | Tensor,
) -> Tensor:
    _checks.knn_interpolate(lm_logits, distances, tokens, temperature, lmbda)
    return distances.new_empty(lm_logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, temperature, lmbda = inputs
    _mixing.save(ctx, (*tensors, output), (temperature, lmbda))


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    *tensors, temperature, lmbda = _mixing.saved(ctx)
    need_logits, _, _, _, need_lmbda = ctx.needs_input_grad
    gradients = _GRADIENTS[isinstance(temperature, Tensor)]
    to_logits, to_distances, to_temperature, to_lmbda = call(
        gradients, grad, *tensors, temperature, lmbda, need_logits, need_lmbda
    )
    return (
        to_logits if need_logits else None,
        to_distances,
        None,
        _mixing.sum_to_parameter(to_temperature, temperature),
        _mixing.sum_to_parameter(to_lmbda, lmbda) if need_lmbda else None,
    )


def _jvp(
    ctx: Any, d_logits: Any, d_distances: Any, _: Any, d_temperature: Any, d_lmbda: Any
) -> Tensor:
    lm_logits, distances, tokens, output, temperature, lmbda = _mixing.saved_primals(ctx)
    changes = (d_logits, d_distances, d_temperature, d_lmbda)
    return _tangents.knn_interpolate(
        lm_logits, distances, tokens, output, temperature, lmbda, *changes
    )


def _fake_gradients(
    grad: Tensor,
    lm_logits: Tensor,
    distances: Tensor,
    tokens: Tensor,
    output: Tensor,
    temperature: float | Tensor,
    lmbda: float | Tensor,
    need_logits: bool,
    need_lmbda: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocab_size = lm_logits.shape
    return (
        lm_logits.new_empty(rows if need_logits else 0, vocab_size),
        *_mixing.fake_neighbor_gradients(distances),
        distances.new_empty(rows if need_lmbda else 0),
    )


for _name in ("", ".tensor"):
    torch.library.register_fake(f"knnext::knn_interpolate{_name}", _fake)
    register_derivatives(
        f"knn_interpolate{_name}", setup_context=_setup_context, backward=_backward, jvp=_jvp
    )
    torch.library.register_fake(f"knnext::_knn_interpolate_gradients{_name}", _fake_gradients)
    register_gradient(f"_knn_interpolate_gradients{_name}", _gradients.knn_interpolate)
