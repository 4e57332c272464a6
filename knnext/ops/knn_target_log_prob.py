"""log p_knn of one token a row: all that perplexity needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks, _gradients, _mixing, _numbers, _tangents
from knnext.ops._derivatives import call, register_derivatives, register_gradient


def knn_target_log_prob(
    distances: Tensor, tokens: Tensor, targets: Tensor, temperature: float | Tensor
) -> Tensor:
    """log p_knn of each row's target, without a (Q, V) tensor, in log space throughout.

    ``log sum over i with tokens[q, i] = targets[q] of softmax_i(-distances[q, i] / temperature)``.

    Args:
        distances: (Q, k) float32 (float64 too on the CPU), smaller is nearer.
        tokens: (Q, k) int64 or int32; -1 is padding.
        targets: (Q,) int64 or int32. A negative target matches nothing, not even padding.
        temperature: above 0; a number, or a tensor () or (Q,).

    Returns:
        (Q,) of the dtype of ``distances``; -inf where no neighbor has the target. Differentiable
        in distances and tensor temperature (gradient 0 where the result is -inf).

    Raises:
        RuntimeError: on a bad argument, naming it, what was given and what is wanted. Values inside
            tensors are read where that costs no wait: on the CPU a token below -1 or a tensor
            temperature that is not above 0 raises too; on
            CUDA such a temperature gives NaN.
    """
    if type(temperature) is not float:
        name = "knn_target_log_prob"
        temperature = _numbers.parameter(name, "temperature", temperature, distances)
    # Not by the bool itself, which torch 2.10 does not compile.
    op = _OP[1 if isinstance(temperature, Tensor) else 0]
    return call(op, distances, tokens, targets, temperature)


_OP = (torch.ops.knnext.knn_target_log_prob.default, torch.ops.knnext.knn_target_log_prob.tensor)
_GRADIENTS = (
    torch.ops.knnext._knn_target_log_prob_gradients.default,
    torch.ops.knnext._knn_target_log_prob_gradients.tensor,
)


def _fake(
    distances: Tensor, tokens: Tensor, targets: Tensor, temperature: float | Tensor
) -> Tensor:
    _checks.knn_target_log_prob(distances, tokens, targets, temperature)
    return distances.new_empty(distances.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, temperature = inputs
    _mixing.save(ctx, (*tensors, output), (temperature,))


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    *tensors, temperature = _mixing.saved(ctx)
    gradients = _GRADIENTS[isinstance(temperature, Tensor)]
    to_distances, per_row = call(gradients, grad, *tensors, temperature)
    return to_distances, None, None, _mixing.sum_to_parameter(per_row, temperature)


def _jvp(ctx: Any, d_distances: Any, _: Any, __: Any, d_temperature: Any) -> Tensor:
    distances, tokens, targets, output, temperature = _mixing.saved_primals(ctx)
    return _tangents.knn_target_log_prob(
        distances, tokens, targets, output, temperature, d_distances, d_temperature
    )


def _fake_gradients(
    grad: Tensor,
    distances: Tensor,
    tokens: Tensor,
    targets: Tensor,
    output: Tensor,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    return _mixing.fake_neighbor_gradients(distances)


for _name in ("", ".tensor"):
    torch.library.register_fake(f"knnext::knn_target_log_prob{_name}", _fake)
    register_derivatives(
        f"knn_target_log_prob{_name}", setup_context=_setup_context, backward=_backward, jvp=_jvp
    )
    torch.library.register_fake(f"knnext::_knn_target_log_prob_gradients{_name}", _fake_gradients)
    register_gradient(f"_knn_target_log_prob_gradients{_name}", _gradients.knn_target_log_prob)
