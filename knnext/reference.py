"""All the mathematics of knnext in plain PyTorch: the oracle of the tests.

Each function mirrors the op of the same name (see ``knnext.ops``), takes tensors on any device,
and computes in ``compute_dtype`` (float64 where exactness matters more than time). It is also
what runs where no compiled library could be loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

INF = float("inf")
BLOCK_BYTES = 128 << 20  # of scores held at once by knn_search


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products in true float32, whatever the process allows (TF32 on CUDA, bf16 on the CPU)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def key_sqnorms(keys: Tensor, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """(N,) sums of squares of the rows."""
    return keys.to(compute_dtype).square().sum(1)


def rescore(
    queries: Tensor,
    keys: Tensor,
    indices: Tensor,
    metric: str = "l2",
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(Q, m) distances of each query to the keys named, by direct subtraction; +inf at -1."""
    padding = indices < 0
    if keys.shape[0] == 0:
        return torch.full(indices.shape, INF, dtype=compute_dtype, device=queries.device)
    rows = keys[indices.masked_fill(padding, 0)].to(compute_dtype)
    q = queries.to(compute_dtype)[:, None, :]
    distances = (q - rows).square().sum(-1) if metric == "l2" else -(q * rows).sum(-1)
    return distances.masked_fill(padding, INF)


def merge_topk(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of (Q, m) candidates, in order of (distance, index); -1 entries lose to all."""
    padding = (indices < 0) | distances.isnan()
    distances = distances.masked_fill(padding, INF)
    # Padding sorts last even against a real entry at distance +inf.
    last = torch.iinfo(torch.int64).max
    indices = indices.to(torch.int64).masked_fill(padding, last)
    short = k - distances.shape[1]
    if short > 0:
        distances = torch.nn.functional.pad(distances, (0, short), value=INF)
        indices = torch.nn.functional.pad(indices, (0, short), value=last)
    by_index = indices.argsort(dim=1, stable=True)
    distances, indices = distances.gather(1, by_index), indices.gather(1, by_index)
    distances, order = distances.sort(dim=1, stable=True)
    indices = indices.gather(1, order)[:, :k]
    return distances[:, :k].contiguous(), indices.masked_fill(indices == last, -1)


def knn_search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str = "l2",
    *,
    key_sqnorms: Tensor | None = None,
    index_offset: int = 0,
    init_distances: Tensor | None = None,
    init_indices: Tensor | None = None,
    refine: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Exact k nearest keys, block by block; see :func:`knnext.knn_search`."""
    num_queries, num_keys, device = queries.shape[0], keys.shape[0], queries.device
    distances = torch.full((num_queries, k), INF, dtype=compute_dtype, device=device)
    indices = torch.full((num_queries, k), -1, dtype=torch.int64, device=device)
    step = max(1, BLOCK_BYTES // max(1, 8 * num_queries))
    q = queries.to(compute_dtype)
    for start in range(0, num_keys, step):
        block = keys[start : start + step].to(compute_dtype)
        with _full_precision():
            scores = q @ block.T
        if metric == "l2":
            norms = (
                block.square().sum(1)
                if key_sqnorms is None
                else key_sqnorms[start : start + step].to(compute_dtype)
            )
            scores = (q.square().sum(1)[:, None] + norms - 2 * scores).clamp_min(0)
        else:
            scores = -scores
        rows = torch.arange(start, start + block.shape[0], device=device).expand_as(scores)
        # A NaN or infinite distance is no neighbor.
        rows = rows.masked_fill(~(scores < INF), -1)
        distances, indices = merge_topk(
            torch.cat([distances, scores], 1), torch.cat([indices, rows], 1), k
        )
    if refine:
        distances = rescore(queries, keys, indices, metric, compute_dtype)
        indices = indices.masked_fill(~(distances < INF), -1)
    indices = torch.where(indices < 0, indices, indices + index_offset)
    if init_distances is not None and init_indices is not None:
        distances = torch.cat([init_distances.to(compute_dtype), distances], 1)
        indices = torch.cat([init_indices, indices], 1)
    return merge_topk(distances, indices, k)


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """A float, () or (Q,) tensor as something that broadcasts against (Q, k)."""
    return torch.as_tensor(value, device=like.device).to(like.dtype).reshape(-1, 1)


def _wide(distances: Tensor) -> Tensor:
    return distances if distances.dtype == torch.float64 else distances.float()


def _log_weights(distances: Tensor, tokens: Tensor, temperature: float | Tensor) -> Tensor:
    """(Q, k) log of the softmax over neighbors; -inf at padding, and all -inf without any."""
    z = -_wide(distances) / _column(temperature, _wide(distances))
    z = z.masked_fill(tokens < 0, -INF)
    none = (z == -INF).all(1, keepdim=True)
    log_w = z.masked_fill(none, 0.0).log_softmax(1) if z.shape[1] else z
    return log_w.masked_fill(none, -INF)


def knn_softmax(
    distances: Tensor, tokens: Tensor, temperature: float | Tensor, vocab_size: int
) -> Tensor:
    """(Q, V) p_knn: softmax of -distances / temperature, summed by token."""
    weights = _log_weights(distances, tokens, temperature).exp()
    p_knn = torch.zeros(
        distances.shape[0], vocab_size, dtype=weights.dtype, device=distances.device
    )
    return p_knn.scatter_add(1, tokens.long().clamp_min(0), weights)


def _log_p_knn(
    distances: Tensor, tokens: Tensor, temperature: float | Tensor, vocab_size: int
) -> Tensor:
    """(Q, V) log p_knn, summed by token in log space (nothing underflows)."""
    log_w = _log_weights(distances, tokens, temperature)
    index = tokens.long().clamp_min(0)
    shape = (log_w.shape[0], vocab_size)
    peak = torch.full(shape, -INF, dtype=log_w.dtype, device=log_w.device)
    peak = peak.scatter_reduce(1, index, log_w.detach(), "amax")
    shift = peak.masked_fill(peak == -INF, 0.0)
    total = torch.zeros_like(peak).scatter_add(1, index, (log_w - shift.gather(1, index)).exp())
    present = peak > -INF
    return torch.where(present, total.masked_fill(~present, 1.0).log() + shift, -INF)


def knn_interpolate(
    lm_logits: Tensor,
    distances: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    lmbda: float | Tensor,
) -> Tensor:
    """(Q, V) log((1 - lmbda) softmax(lm_logits) + lmbda p_knn)."""
    log_p_knn = _log_p_knn(distances, tokens, temperature, lm_logits.shape[1])
    log_p_lm = lm_logits.to(log_p_knn.dtype).log_softmax(1)
    weight = _column(lmbda, log_p_knn).expand(log_p_knn.shape[0], 1)
    lonely = (log_p_knn == -INF).all(1, keepdim=True)
    weight = weight.masked_fill(lonely, 0.0)
    return torch.logaddexp(torch.log1p(-weight) + log_p_lm, weight.log() + log_p_knn)


def knn_target_log_prob(
    distances: Tensor, tokens: Tensor, targets: Tensor, temperature: float | Tensor
) -> Tensor:
    """(Q,) log p_knn of each row's target; -inf where no neighbor has it."""
    log_w = _log_weights(distances, tokens, temperature)
    other = (tokens.long() != targets.long()[:, None]) | (tokens < 0)
    return log_w.masked_fill(other, -INF).logsumexp(1)


def gather_tokens(values: Tensor, indices: Tensor) -> Tensor:
    """(Q, k) ``values[indices]``, with -1 where the index is -1."""
    if values.shape[0] == 0:
        return torch.full(indices.shape, -1, dtype=values.dtype, device=values.device)
    return values[indices.clamp_min(0)].masked_fill(indices < 0, -1)
