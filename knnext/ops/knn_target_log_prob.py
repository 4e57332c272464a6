"""log p_knn of one token a row: all that perplexity needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks, _gradients, _mixing
from knnext.ops._no_gradient import refuse_second_derivative


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
    if isinstance(temperature, Tensor):
        return torch.ops.knnext.knn_target_log_prob.tensor(distances, tokens, targets, temperature)
    return torch.ops.knnext.knn_target_log_prob.default(distances, tokens, targets, temperature)


def _fake(
    distances: Tensor, tokens: Tensor, targets: Tensor, temperature: float | Tensor
) -> Tensor:
    _checks.knn_target_log_prob(distances, tokens, targets, temperature)
    return distances.new_empty(distances.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    distances, tokens, targets, temperature = inputs
    is_tensor = isinstance(temperature, Tensor)
    ctx.temperature = None if is_tensor else temperature
    ctx.save_for_backward(distances, tokens, targets, output, *([temperature] if is_tensor else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    distances, tokens, targets, output, *rest = ctx.saved_tensors
    temperature = rest[0] if rest else ctx.temperature
    to_distances, per_row = _run_gradients(grad, distances, tokens, targets, output, temperature)
    return to_distances, None, None, _mixing.sum_to_parameter(per_row, temperature)


def _run_gradients(
    grad: Tensor,
    distances: Tensor,
    tokens: Tensor,
    targets: Tensor,
    output: Tensor,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    args = (grad, distances, tokens, targets, output, temperature)
    if torch.is_grad_enabled():  # plain PyTorch has a second derivative
        return _gradients.knn_target_log_prob(*args)
    op = torch.ops.knnext._knn_target_log_prob_gradients
    return (op.tensor if isinstance(temperature, Tensor) else op.default)(*args)


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
    torch.library.register_autograd(
        f"knnext::knn_target_log_prob{_name}", _backward, setup_context=_setup_context
    )
    torch.library.register_fake(f"knnext::_knn_target_log_prob_gradients{_name}", _fake_gradients)
    refuse_second_derivative(f"_knn_target_log_prob_gradients{_name}")
