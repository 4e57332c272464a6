"""The gradients in plain PyTorch, with the signatures of the ops ``knnext::_X_gradients``.

They run where no compiled library could be loaded, and where they are differentiated themselves,
in whatever mode: so nothing here writes in place then, and no factor of 0 is masked that somebody
may differentiate by. csrc/cpu and csrc/cuda hold the same formulas in fewer passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from knnext import reference
from knnext.ops._derivatives import derivatives_asked

INF = float("inf")
# Rows of keys that the gradient of rescore holds at once.
RESCORE_BYTES = 64 << 20


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
    shares = (neighbor_share(log_a, log_m, weight) * grad_at).masked_fill(absent, 0.0)
    to_neighbors = _through_weights(shares, log_a, distances, tokens, temperature)

    grad_logits = lm_logits.new_empty(0, lm_logits.shape[1])
    grad_lmbda = distances.new_empty(0)
    if need_logits:
        log_p_lm = lm_logits.to(log_a.dtype).log_softmax(1)
        to_lm = lm_share(log_p_lm, weight, output, index) * grad
        whole = to_lm.sum(1, keepdim=True)
        grad_logits = (to_lm - log_p_lm.exp() * whole).to(lm_logits.dtype)
    if need_lmbda:
        grad_lmbda = _lmbda_gradient(lm_logits, log_a, log_m, output, grad, grad_at)
    return grad_logits, *to_neighbors, grad_lmbda


def neighbor_share(log_a: Tensor, log_m: Tensor, weight: Tensor) -> Tensor:
    """(Q, k) lmbda a / m: the share of each neighbor in what the mixture gives its token."""
    absent = log_a == -INF
    return _times_exp(weight, (log_a - log_m).masked_fill(absent, -INF))


def _times_exp(weight: Tensor, log_ratio: Tensor) -> Tensor:
    """``weight * exp(log_ratio)`` in logs, as the ratio alone may overflow; where the weight is 0,
    so that its derivative is the ratio.
    """
    none = weight == 0
    share = (weight.masked_fill(none, 1.0).log() + log_ratio.masked_fill(none, -INF)).exp()
    if not derivatives_asked(weight, log_ratio):
        return share
    ratio = log_ratio.masked_fill(~none | _overflows(log_ratio), -INF).exp()
    return torch.where(none, weight * ratio, share)


def lm_share(log_p_lm: Tensor, weight: Tensor, output: Tensor, index: Tensor) -> Tensor:
    """(Q, V) (1 - lmbda) p_lm / m: 1 but where a neighbor has the token, 0 at lmbda = 1."""
    elsewhere = (weight < 1).to(output.dtype).expand_as(output)
    if derivatives_asked(log_p_lm, weight, output):  # they must see the whole ratio
        impossible = output == -INF
        log_ratio = log_p_lm - output.masked_fill(impossible, 0.0)
        share = _times_exp(1 - weight, log_ratio.masked_fill(impossible, -INF))
        return torch.where(impossible, elsewhere, share)
    log_m = output.gather(1, index)
    share = (torch.log1p(-weight) + log_p_lm.gather(1, index) - log_m).exp()
    return elsewhere.scatter(
        1, index, torch.where(log_m == -INF, elsewhere.gather(1, index), share)
    )


def _lmbda_gradient(
    lm_logits: Tensor, log_a: Tensor, log_m: Tensor, output: Tensor, grad: Tensor, grad_at: Tensor
) -> Tensor:
    """(Q,) sum over v of grad_v (p_knn - p_lm)_v / m_v; 0 for a row without a neighbor."""
    toward_knn = ratio_times(log_a, log_m, grad_at)
    toward_lm = ratio_times(lm_logits.to(log_a.dtype).log_softmax(1), output, grad)
    return (toward_knn.sum(1) - toward_lm.sum(1)).masked_fill((log_a == -INF).all(1), 0.0)


def ratio_times(log_part: Tensor, log_whole: Tensor, factor: Tensor) -> Tensor:
    """``exp(log_part - log_whole) * factor``, 0 where the part is.

    The ratio has no bound (lmbda 0 or 1), so a factor of 0 is kept from meeting an infinite one.
    """
    log_ratio = log_part - log_whole.masked_fill(log_part == -INF, 0.0)
    nothing = (factor == 0) & _overflows(log_ratio)
    product = log_ratio.masked_fill(nothing, -INF).exp() * factor
    return product.masked_fill(log_part == -INF, 0.0)


def _overflows(log_ratio: Tensor) -> Tensor:
    return log_ratio > math.log(torch.finfo(log_ratio.dtype).max)


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
    to_queries = []
    grad_keys = torch.zeros_like(keys[: None if order is not None else 0], dtype=grad.dtype)
    watched = derivatives_asked(grad, queries, keys)
    step = max(1, RESCORE_BYTES // (grad.element_size() * dim * max(1, width)))
    for start in range(0, queries.shape[0] if keys.shape[0] else 0, step):
        part = slice(start, start + step)
        named = indices[part]
        weight = grad[part].masked_fill(named < 0, 0.0)[:, :, None]
        rows = named.clamp_min(0).reshape(-1)
        x = keys[rows].to(grad.dtype).view(*named.shape, dim)
        q = queries[part].to(grad.dtype)[:, None, :]
        # d/dq sum (q - x)^2 = 2 (q - x); the key's gradient is its negative.
        if metric == "l2":
            by_query = _weighted(2 * (q - x), weight)
            by_key = -by_query
        else:
            by_query, by_key = _weighted(-x, weight), _weighted(-q.expand_as(x), weight)
        if need_queries:
            to_queries.append(by_query.sum(1))
        if order is not None:
            grad_keys = _add_rows(grad_keys, rows, by_key.reshape(-1, dim), in_place=not watched)
    none = torch.zeros_like(queries[: None if need_queries else 0], dtype=grad.dtype)
    grad_queries = torch.cat(to_queries) if to_queries else none
    return grad_queries.to(queries.dtype), grad_keys.to(keys.dtype)


def _weighted(rows: Tensor, weight: Tensor) -> Tensor:
    """A row that weighs nothing gives nothing, also where it holds inf or NaN."""
    return rows.masked_fill((weight == 0) & ~rows.isfinite(), 0.0) * weight


def _add_rows(total: Tensor, rows: Tensor, values: Tensor, in_place: bool) -> Tensor:
    """``total[rows] += values`` in an order that does not change from run to run."""
    if total.is_cuda:  # sorts; index_add there does not
        add = total.index_put_ if in_place else total.index_put
        return add((rows,), values, accumulate=True)
    return (total.index_add_ if in_place else total.index_add)(0, rows, values)


GRADIENTS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "_knn_softmax_gradients": knn_softmax,
    "_knn_interpolate_gradients": knn_interpolate,
    "_knn_target_log_prob_gradients": knn_target_log_prob,
    "_rescore_gradients": rescore,
}
