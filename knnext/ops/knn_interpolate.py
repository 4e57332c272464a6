"""The mixture of the LM and its neighbors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks, _gradients, _mixing
from knnext.ops._no_gradient import refuse_second_derivative


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
    if isinstance(temperature, Tensor) or isinstance(lmbda, Tensor):
        temperature, lmbda = _mixing.both_tensors(temperature, lmbda, distances)
        overload = torch.ops.knnext.knn_interpolate.tensor
        return overload(lm_logits, distances, tokens, temperature, lmbda)
    overload = torch.ops.knnext.knn_interpolate.default
    return overload(lm_logits, distances, tokens, temperature, lmbda)


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
    lm_logits, distances, tokens, temperature, lmbda = inputs
    is_tensor = isinstance(temperature, Tensor)
    ctx.numbers = None if is_tensor else (temperature, lmbda)
    parameters = [temperature, lmbda] if is_tensor else []
    ctx.save_for_backward(lm_logits, distances, tokens, output, *parameters)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    lm_logits, distances, tokens, output, *rest = ctx.saved_tensors
    temperature, lmbda = rest or ctx.numbers
    need_logits, _, _, _, need_lmbda = ctx.needs_input_grad
    to_logits, to_distances, to_temperature, to_lmbda = _run_gradients(
        grad, lm_logits, distances, tokens, output, temperature, lmbda, need_logits, need_lmbda
    )
    return (
        to_logits if need_logits else None,
        to_distances,
        None,
        _mixing.sum_to_parameter(to_temperature, temperature),
        _mixing.sum_to_parameter(to_lmbda, lmbda) if need_lmbda else None,
    )


def _run_gradients(
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
    inputs = (grad, lm_logits, distances, tokens, output)
    rest = (temperature, lmbda, need_logits, need_lmbda)
    if torch.is_grad_enabled():  # plain PyTorch has a second derivative
        return _gradients.knn_interpolate(*inputs, *rest)
    op = torch.ops.knnext._knn_interpolate_gradients
    return (op.tensor if isinstance(temperature, Tensor) else op.default)(*inputs, *rest)


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
    torch.library.register_autograd(
        f"knnext::knn_interpolate{_name}", _backward, setup_context=_setup_context
    )
    torch.library.register_fake(f"knnext::_knn_interpolate_gradients{_name}", _fake_gradients)
    refuse_second_derivative(f"_knn_interpolate_gradients{_name}")
