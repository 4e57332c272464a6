"""The mixture of the LM and its neighbors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks, _mixing


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
    log_a = _mixing.log_weights(distances, tokens, temperature)
    lonely = (log_a == -_mixing.INF).all(1, keepdim=True)
    weight = _mixing.column(lmbda, log_a).expand(log_a.shape[0], 1).masked_fill(lonely, 0.0)
    log_p_lm = lm_logits.to(log_a.dtype).log_softmax(1)

    # d out_v / d(p_lm_v) = (1 - lmbda) / m_v and so on; every ratio below is at most 1.
    dead = output == -_mixing.INF
    to_lm = (torch.log1p(-weight) + log_p_lm - output).exp().masked_fill(dead, 0.0) * grad
    grad_logits = to_lm - log_p_lm.exp() * to_lm.sum(1, keepdim=True)

    index = tokens.long().clamp_min(0)
    padding = (tokens < 0) | (log_a == -_mixing.INF)
    log_m = output.gather(1, index).masked_fill(padding, 0.0)
    ratio = (log_a.masked_fill(padding, 0.0) - log_m).masked_fill(padding, -_mixing.INF)
    grad_at = grad.gather(1, index).masked_fill(padding, 0.0)
    to_knn = (weight.log() + ratio).exp() * grad_at
    grad_z = to_knn - log_a.exp() * to_knn.sum(1, keepdim=True)
    grad_distances, grad_temperature = _mixing.neighbor_gradients(
        grad_z, distances, tokens, temperature, ctx.needs_input_grad[3]
    )

    grad_lmbda = None
    if isinstance(lmbda, Tensor) and ctx.needs_input_grad[4]:
        toward_knn = (ratio.exp() * grad_at).sum(1)
        toward_lm = ((log_p_lm - output).exp() * grad).masked_fill(grad == 0, 0.0).sum(1)
        per_row = (toward_knn - toward_lm).masked_fill(lonely[:, 0], 0.0)
        grad_lmbda = _mixing.sum_to_parameter(per_row, lmbda)
    return grad_logits.to(lm_logits.dtype), grad_distances, None, grad_temperature, grad_lmbda


for _name in ("knnext::knn_interpolate", "knnext::knn_interpolate.tensor"):
    torch.library.register_fake(_name, _fake)
    torch.library.register_autograd(_name, _backward, setup_context=_setup_context)
