"""The gradients in plain PyTorch, with the signatures of the ops ``knnext::_X_gradients``.

They run where no compiled library could be loaded, and where a second derivative is asked for:
autograd then differentiates them. csrc/cpu and csrc/cuda hold the same formulas in fewer passes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from knnext import reference

INF = float("inf")
# Rows of keys that the gradient of rescore holds at once.
_RESCORE_BYTES = 64 << 20


def _through_weights(
    shares: Tensor, log_a: Tensor, distances: Tensor, tokens: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(Q, k) gradient of distances and (Q,) of the temperature.

    ``shares`` (Q, k) is what reaches each neighbor, times its weight a = softmax(z); then
    dz = shares - a sum(shares), and z = -d / t gives dz/dd = -1 / t and dz/dt = d / t^2.
    """
    grad_z = shares - log_a.exp() * shares.sum(1, keepdim=True)
    t = reference._column(temperature, grad_z)
    grad_distances = -grad_z / t
    # A dead neighbor has grad_z 0, and 0 * inf must not become NaN. A row of grad_z sums to 0, so
    # any origin does for the distances; from the nearest, they are small and so is the rounding.
    absent = (tokens < 0) | (distances == INF)
    origin = distances.masked_fill(absent, INF).amin(1, keepdim=True) if distances.shape[1] else 0.0
    per_row = (-grad_distances * (distances - origin).masked_fill(absent, 0.0) / t).sum(1)
    return grad_distances, per_row


def knn_softmax(
    grad: Tensor, distances: Tensor, tokens: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    log_a = reference._log_weights(distances, tokens, temperature)
    shares = log_a.exp() * grad.gather(1, tokens.long().clamp_min(0))
    return _through_weights(shares, log_a, distances, tokens, temperature)


def knn_target_log_prob(
    grad: Tensor,
    distances: Tensor,
    tokens: Tensor,
    targets: Tensor,
    output: Tensor,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    log_a = reference._log_weights(distances, tokens, temperature)
    match = (tokens.long() == targets.long()[:, None]) & (tokens >= 0)
    missing = (output == -INF)[:, None]
    # Share of each neighbor in its target's mass.
    share = (log_a - output[:, None].masked_fill(missing, 0.0)).exp()
    shares = (grad[:, None] * share.masked_fill(~match, 0.0)).masked_fill(missing, 0.0)
    return _through_weights(shares, log_a, distances, tokens, temperature)


def knn_interpolate(
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
    log_a = reference._log_weights(distances, tokens, temperature)
    absent = log_a == -INF
    lonely = absent.all(1, keepdim=True)
    weight = reference._column(lmbda, log_a).expand(log_a.shape[0], 1).masked_fill(lonely, 0.0)

    # With m the mixture: d log m / d p_knn = lmbda / m, d log m / d p_lm = (1 - lmbda) / m.
    index = tokens.long().clamp_min(0)
    log_m, grad_at = output.gather(1, index), grad.gather(1, index)
    shares = (weight.log() + log_a - log_m).exp() * grad_at
    shares = shares.masked_fill(absent | (weight == 0), 0.0)
    to_neighbors = _through_weights(shares, log_a, distances, tokens, temperature)

    grad_logits = lm_logits.new_empty(0, lm_logits.shape[1])
    grad_lmbda = distances.new_empty(0)
    if need_logits:
        log_p_lm = lm_logits.to(log_a.dtype).log_softmax(1)
        to_lm = _lm_share(log_p_lm, weight, output, index) * grad
        whole = to_lm.sum(1, keepdim=True)
        grad_logits = torch.addcmul(to_lm, log_p_lm.exp(), whole, value=-1).to(lm_logits.dtype)
    if need_lmbda:
        grad_lmbda = _lmbda_gradient(lm_logits, log_a, log_m, output, grad, grad_at)
    return grad_logits, *to_neighbors, grad_lmbda


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
    lm_logits: Tensor, log_a: Tensor, log_m: Tensor, output: Tensor, grad: Tensor, grad_at: Tensor
) -> Tensor:
    """(Q,) sum over v of grad_v (p_knn - p_lm)_v / m_v; 0 for a row without a neighbor.

    The ratios have no bound (lmbda 0 or 1), so a gradient of 0 is kept from meeting an infinite
    one.
    """
    absent = log_a == -INF
    toward_knn = ((log_a - log_m).exp() * grad_at).masked_fill(absent | (grad_at == 0), 0.0)
    log_p_lm = lm_logits.to(log_a.dtype).log_softmax(1)
    nothing = (grad == 0) | (log_p_lm == -INF)
    toward_lm = ((log_p_lm - output).exp() * grad).masked_fill(nothing, 0.0)
    return (toward_knn.sum(1) - toward_lm.sum(1)).masked_fill(absent.all(1), 0.0)


def rescore(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    indices: Tensor,
    order: Tensor | None,
    metric: str,
    need_queries: bool,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk. ``order`` only says whether the gradient of keys is wanted."""
    dim, width = keys.shape[1], indices.shape[1]
    grad_queries = torch.zeros_like(queries[: None if need_queries else 0], dtype=grad.dtype)
    grad_keys = torch.zeros_like(keys[: None if order is not None else 0], dtype=grad.dtype)
    step = max(1, _RESCORE_BYTES // (grad.element_size() * dim * max(1, width)))
    for start in range(0, queries.shape[0] if keys.shape[0] else 0, step):
        part = slice(start, start + step)
        named = indices[part]
        weight = grad[part].masked_fill(named < 0, 0.0)[:, :, None]
        rows = named.clamp_min(0).reshape(-1)
        x = keys[rows].to(grad.dtype).view(*named.shape, dim)
        q = queries[part].to(grad.dtype)[:, None, :]
        # d/dq sum (q - x)^2 = 2 (q - x); the key's gradient is its negative.
        to_queries = 2 * weight * (q - x) if metric == "l2" else -weight * x
        to_keys = -to_queries if metric == "l2" else -weight * q
        # A row that weighs nothing gives nothing, also where it holds inf or NaN.
        if need_queries:
            grad_queries[part] = to_queries.masked_fill(weight == 0, 0.0).sum(1)
        if order is not None:
            to_keys = to_keys.masked_fill(weight == 0, 0.0).reshape(-1, dim)
            _add_rows(grad_keys, rows, to_keys)
    return grad_queries.to(queries.dtype), grad_keys.to(keys.dtype)


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """``total[rows] += values`` in an order that does not change from run to run."""
    if total.is_cuda:
        total.index_put_((rows,), values, accumulate=True)  # sorts; index_add_ there does not
    else:
        total.index_add_(0, rows, values)


GRADIENTS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "_knn_softmax_gradients": knn_softmax,
    "_knn_interpolate_gradients": knn_interpolate,
    "_knn_target_log_prob_gradients": knn_target_log_prob,
    "_rescore_gradients": rescore,
}
