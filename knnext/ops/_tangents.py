"""The forward derivatives of the ops in plain PyTorch: what a change of the inputs does to the
output, to first order. A tangent is None where its input does not change.

Differentiable themselves, as the gradients in _gradients.py are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from knnext import reference
from knnext.ops._gradients import INF, RESCORE_BYTES, lm_share, neighbor_share, ratio_times


def _of_log_weights(
    log_a: Tensor,
    distances: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    d_distances: Tensor | None,
    d_temperature: Tensor | None,
) -> Tensor:
    """(Q, k) tangent of log a = log softmax(z), z = -d / t: that of z less its mean under a."""
    t = reference._column(temperature, log_a)
    absent = (tokens < 0) | (distances == INF)
    dz = torch.zeros_like(log_a)
    if d_distances is not None:
        dz = dz - d_distances.masked_fill(absent, 0.0) / t
    if d_temperature is not None and distances.shape[1]:
        # Any origin does, as the mean is taken off: from the nearest, the rounding is small.
        origin = distances.masked_fill(absent, INF).amin(1, keepdim=True)
        far = (distances - origin).masked_fill(absent, 0.0).to(log_a.dtype)
        dz = dz + far / t * (reference._column(d_temperature, log_a) / t)
    return (dz - (log_a.exp() * dz).sum(1, keepdim=True)).masked_fill(absent, 0.0)


def _sum_by_token(values: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    total = values.new_zeros(values.shape[0], vocab_size)
    return total.scatter_add(1, tokens.long().clamp_min(0), values)


def knn_softmax(
    distances: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    vocab_size: int,
    d_distances: Tensor | None,
    d_temperature: Tensor | None,
) -> Tensor:
    log_a = reference._log_weights(distances, tokens, temperature)
    d_log_a = _of_log_weights(log_a, distances, tokens, temperature, d_distances, d_temperature)
    tangent = _sum_by_token(log_a.exp() * d_log_a, tokens, vocab_size)
    return tangent.masked_fill(reference._spoiled(log_a), reference.NAN)


def knn_target_log_prob(
    distances: Tensor,
    tokens: Tensor,
    targets: Tensor,
    output: Tensor,
    temperature: float | Tensor,
    d_distances: Tensor | None,
    d_temperature: Tensor | None,
) -> Tensor:
    log_a = reference._log_weights(distances, tokens, temperature)
    d_log_a = _of_log_weights(log_a, distances, tokens, temperature, d_distances, d_temperature)
    other = (tokens.long() != targets.long()[:, None]) | (tokens < 0)
    missing = (output == -INF)[:, None]
    share = (log_a - output[:, None].masked_fill(missing, 0.0)).masked_fill(other, -INF).exp()
    return (share * d_log_a).sum(1)


def knn_interpolate(
    lm_logits: Tensor,
    distances: Tensor,
    tokens: Tensor,
    output: Tensor,
    temperature: float | Tensor,
    lmbda: float | Tensor,
    d_logits: Tensor | None,
    d_distances: Tensor | None,
    d_temperature: Tensor | None,
    d_lmbda: Tensor | None,
) -> Tensor:
    log_a = reference._log_weights(distances, tokens, temperature)
    lonely = (log_a == -INF).all(1, keepdim=True)
    weight = reference._column(lmbda, log_a).expand(log_a.shape[0], 1).masked_fill(lonely, 0.0)
    index, vocab_size = tokens.long().clamp_min(0), lm_logits.shape[1]
    log_m = output.gather(1, index)
    log_p_lm = lm_logits.to(log_a.dtype).log_softmax(1)
    tangent = torch.zeros_like(output)
    if d_distances is not None or d_temperature is not None:
        d_log_a = _of_log_weights(log_a, distances, tokens, temperature, d_distances, d_temperature)
        shares = neighbor_share(log_a, log_m, weight) * d_log_a
        tangent = tangent + _sum_by_token(shares, tokens, vocab_size)
    if d_logits is not None:
        d_x = d_logits.to(log_a.dtype)
        d_log_p_lm = d_x - (log_p_lm.exp() * d_x).sum(1, keepdim=True)
        tangent = tangent + lm_share(log_p_lm, weight, output, index) * d_log_p_lm
    if d_lmbda is not None:
        rate = reference._column(d_lmbda, log_a).expand_as(weight).masked_fill(lonely, 0.0)
        toward_knn = ratio_times(log_a, log_m, rate.expand_as(log_a))
        toward_lm = ratio_times(log_p_lm, output, rate.expand_as(output))
        tangent = tangent + _sum_by_token(toward_knn, tokens, vocab_size) - toward_lm
    return tangent.masked_fill(reference._spoiled(log_a), reference.NAN)


def rescore(
    queries: Tensor,
    keys: Tensor,
    indices: Tensor,
    metric: str,
    d_queries: Tensor | None,
    d_keys: Tensor | None,
) -> Tensor:
    """Chunk by chunk, as the rows named may be many times the keys."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    dim, width = keys.shape[1], indices.shape[1]
    if not keys.shape[0]:
        return torch.zeros(indices.shape, dtype=dtype, device=queries.device)
    step = max(1, RESCORE_BYTES // (dtype.itemsize * dim * max(1, width)))
    parts = []
    for start in range(0, max(1, queries.shape[0]), step):
        part = slice(start, start + step)
        rows = indices[part].clamp_min(0)
        x, q = keys[rows].to(dtype), queries[part].to(dtype)[:, None, :]
        dx = torch.zeros_like(x) if d_keys is None else d_keys[rows].to(dtype)
        dq = torch.zeros_like(q) if d_queries is None else d_queries[part].to(dtype)[:, None, :]
        change = 2 * (q - x) * (dq - dx) if metric == "l2" else -(dq * x + q * dx)
        parts.append(change.sum(2).masked_fill(indices[part] < 0, 0.0))
    return torch.cat(parts)
