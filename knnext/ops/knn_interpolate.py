"""The mixture of the LM and its neighbors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks, _mixing
from knnext.ops._mixing import INF


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
    need_logits, need_distances, _, need_temperature, need_lmbda = ctx.needs_input_grad
    log_a = _mixing.log_weights(distances, tokens, temperature)
    absent = log_a == -INF
    lonely = absent.all(1, keepdim=True)
    weight = _mixing.column(lmbda, log_a).expand(log_a.shape[0], 1).masked_fill(lonely, 0.0)

    # With m the mixture: d log m / d p_knn = lmbda / m, d log m / d p_lm = (1 - lmbda) / m.
    index = tokens.long().clamp_min(0)
    log_m, grad_at = output.gather(1, index), grad.gather(1, index)
    grad_distances = grad_temperature = grad_logits = grad_lmbda = None
    if need_distances or need_temperature:
        share = (weight.log() + log_a - log_m).exp() * grad_at
        share = share.masked_fill(absent | (weight == 0), 0.0)
        grad_z = share - log_a.exp() * share.sum(1, keepdim=True)
        grad_distances, grad_temperature = _mixing.neighbor_gradients(
            grad_z, distances, tokens, temperature, need_temperature
        )
    if need_logits:
        log_p_lm = lm_logits.to(log_a.dtype).log_softmax(1)
        to_lm = _lm_share(log_p_lm, weight, output, index) * grad
        grad_logits = torch.addcmul(to_lm, log_p_lm.exp(), to_lm.sum(1, keepdim=True), value=-1).to(
            lm_logits.dtype
        )
    if need_lmbda:
        grad_lmbda = _lmbda_gradient(lm_logits, log_a, log_m, output, grad, grad_at, lmbda)
    return grad_logits, grad_distances, None, grad_temperature, grad_lmbda


def _lm_share(log_p_lm: Tensor, weight: Tensor, output: Tensor, index: Tensor) -> Tensor:
    """(1 - lmbda) p_lm / m: 1 but where a neighbor has the token, 0 all over at lmbda = 1."""
    log_rest = torch.log1p(-weight)
    elsewhere = (weight < 1).to(output.dtype).expand_as(output)
    if torch.is_grad_enabled():  # a second derivative must see the whole ratio
        share = (log_rest + log_p_lm - output).exp()
        return torch.where(output == -INF, elsewhere, share)
    log_m = output.gather(1, index)
    share = (log_rest + log_p_lm.gather(1, index) - log_m).exp()
    return elsewhere.scatter(
        1, index, torch.where(log_m == -INF, elsewhere.gather(1, index), share)
    )


def _lmbda_gradient(
    lm_logits: Tensor,
    log_a: Tensor,
    log_m: Tensor,
    output: Tensor,
    grad: Tensor,
    grad_at: Tensor,
    lmbda: Tensor,
) -> Tensor:
    """Sum over v of grad_v (p_knn - p_lm)_v / m_v; 0 for a row without a neighbor.

    The ratios have no bound (lmbda 0 or 1), so a gradient of 0 is kept from meeting an infinite
    one.
    """
    absent = log_a == -INF
    toward_knn = ((log_a - log_m).exp() * grad_at).masked_fill(absent | (grad_at == 0), 0.0)
    log_p_lm = lm_logits.to(log_a.dtype).log_softmax(1)
    nothing = (grad == 0) | (log_p_lm == -INF)
    toward_lm = ((log_p_lm - output).exp() * grad).masked_fill(nothing, 0.0)
    per_row = toward_knn.sum(1) - toward_lm.sum(1)
    return _mixing.sum_to_parameter(per_row.masked_fill(absent.all(1), 0.0), lmbda)


for _name in ("knnext::knn_interpolate", "knnext::knn_interpolate.tensor"):
    torch.library.register_fake(_name, _fake)
    torch.library.register_autograd(_name, _backward, setup_context=_setup_context)
