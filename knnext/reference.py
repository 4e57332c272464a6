"""All the mathematics of knnext in plain PyTorch: the oracle of the tests.

Each function mirrors the op of the same name (see ``knnext.ops``), takes tensors on any device,
and computes in ``compute_dtype`` (float64 where exactness matters more than time). It is also
what runs where no compiled library could be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

INF = float("inf")
NAN = float("nan")
CODE_LIMIT = 127  # of encode_keys: codes lie in [-127, 127]
BLOCK_BYTES = 128 << 20  # of scores held at once by knn_search


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products in true float32, whatever the process allows (TF32 on CUDA, bf16 on the CPU)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
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
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """(Q, m) distances of each query to the keys named, by direct subtraction; +inf at -1."""
    compute_dtype = compute_dtype or torch.promote_types(queries.dtype, torch.float32)
    padding = indices < 0
    if keys.shape[0] == 0:
        return torch.full(indices.shape, INF, dtype=compute_dtype, device=queries.device)
    rows = keys[indices.masked_fill(padding, 0)].to(compute_dtype)
    return _direct(queries.to(compute_dtype), rows, metric).masked_fill(padding, INF)


def _direct(queries: Tensor, rows: Tensor, metric: str) -> Tensor:
    """(Q, m) distances to rows (Q, m, D) or (1, m, D): by subtraction, where there is one."""
    q = queries[:, None, :]
    return (q - rows).square().sum(-1) if metric == "l2" else -(q * rows).sum(-1)


def _expanded(queries: Tensor, keys: Tensor, sqnorms: Tensor | None, metric: str) -> Tensor:
    """(Q, N) distances by one product of matrices, norms given or not."""
    with _full_precision(queries.device):
        products = queries @ keys.T
    if metric == "ip":
        return -products
    norms = keys.square().sum(1) if sqnorms is None else sqnorms.to(keys.dtype)
    return (queries.square().sum(1)[:, None] + norms - 2 * products).clamp_min(0)


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
        # Not pad(): its value goes through float64, which turns the largest int64 into the least.
        indices = torch.cat([indices, indices.new_full((len(indices), short), last)], 1)
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
    # With refine every difference of a block is held, not only their sums.
    held = num_queries * (queries.shape[1] if refine else 1)
    step = max(1, BLOCK_BYTES // max(1, 8 * held))
    q = queries.to(compute_dtype)
    for start in range(0, num_keys, step):
        block = keys[start : start + step].to(compute_dtype)
        if refine:
            scores = _direct(q, block[None], metric)
        else:
            norms = None if key_sqnorms is None else key_sqnorms[start : start + step]
            scores = _expanded(q, block, norms, metric)
        rows = torch.arange(start, start + block.shape[0], device=device).expand_as(scores)
        rows = rows.masked_fill(~scores.isfinite(), -1)
        distances, indices = merge_topk(
            torch.cat([distances, scores], 1), torch.cat([indices, rows], 1), k
        )
    indices = torch.where(indices < 0, indices, indices + index_offset)
    if init_distances is not None and init_indices is not None:
        distances = torch.cat([init_distances.to(compute_dtype), distances], 1)
        indices = torch.cat([init_indices, indices], 1)
    return merge_topk(distances, indices, k)


def rotate(rows: Tensor) -> Tensor:
    """(N, D) rows under the rotation of :func:`encode_keys`, the same for every D.

    Random signs, a Walsh-Hadamard transform of the first W dimensions, other signs, one of the
    last W; W is the largest power of two up to D. In the dtype of ``rows``.
    """
    dim = rows.shape[1]
    width = 1 << (dim.bit_length() - 1)
    for window, signs in zip((slice(0, width), slice(dim - width, dim)), _signs(dim), strict=True):
        rows = rows * signs.to(rows)
        mixed = rows[:, window]
        span = 1
        while span < width:
            pairs = mixed.reshape(len(rows), width // (2 * span), 2, span)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            mixed = torch.stack([a + b, a - b], 2).reshape(len(rows), width)
            span *= 2
        rows = rows.clone()
        rows[:, window] = mixed / math.sqrt(width)
    return rows


def _signs(dim: int) -> Tensor:
    """(2, D) float64 of 1 and -1: the highest bits of SplitMix64 (Steele, Lea, Flood, 2014)."""
    state = np.arange(2 * dim, dtype=np.uint64) + np.uint64(dim << 32)
    z = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return torch.from_numpy(1.0 - 2.0 * (z >> np.uint64(63)).astype(np.float64)).view(2, dim)


def encode_keys(keys: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) int8 codes of rotate(keys - center), and (N, 3) float32: each row's scale s, an upper
    bound of |rotate(key - center) - s code|, and |s code|; see :func:`knnext.encode_keys`.
    """
    step = max(1, BLOCK_BYTES // (64 * max(1, keys.shape[1])))
    parts = [_encode(keys[i : i + step], center) for i in range(0, max(1, len(keys)), step)]
    codes, stats = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(stats)


def _encode(keys: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    rows = keys.to(torch.float64)
    held = rows.isfinite().all(1)
    rotated = rotate(torch.where(held[:, None], rows - center.to(rows), 0.0))
    largest = rotated.abs().amax(1)
    scale = (largest / CODE_LIMIT).to(torch.float32)
    # A row too small to scale, or too large for float32, is its whole error.
    coded = (largest >= 2.0**-50) & (largest <= 2.0**50)
    scale = torch.where(coded, scale, 0.0)
    steps = rotated / torch.where(coded, scale, 1.0).to(rows)[:, None]
    codes = torch.where(coded[:, None], steps.round().clamp(-CODE_LIMIT, CODE_LIMIT), 0.0)
    restored = codes * scale.to(rows)[:, None]
    norm = restored.square().sum(1).sqrt()
    error = (rotated - restored).square().sum(1).sqrt()
    # Rounding of float64 and of the answer to float32: far below both.
    error = (error + 2.0**-40 * rotated.square().sum(1).sqrt()) * (1 + 2.0**-20) + 2.0**-125
    error = torch.where(largest <= 2.0**50, error, INF)
    stats = torch.stack([scale.to(rows), error, norm], 1).to(torch.float32)
    # A row with NaN or infinity is never found: nothing needs to bound it.
    never = torch.tensor([0.0, 0.0, INF], dtype=torch.float32, device=keys.device)
    return codes.to(torch.int8), torch.where(held[:, None], stats, never)


def knn_search_codes(
    queries: Tensor,
    keys: Tensor,
    codes: Tensor,
    code_stats: Tensor,
    center: Tensor,
    k: int,
    metric: str = "l2",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`knn_search`, whatever the codes: they only save work. ``keys`` may be elsewhere."""
    return knn_search(queries, keys.to(queries.device), k, metric, **options)


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """A number, a () or a (Q,) tensor, as something that broadcasts against (Q, k)."""
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=like.dtype).reshape(-1, 1)
    return torch.full((1, 1), value, dtype=like.dtype, device=like.device)


def _log_weights(distances: Tensor, tokens: Tensor, temperature: float | Tensor) -> Tensor:
    """(Q, k) log of the softmax over neighbors.

    -inf at padding and at distance +inf, so all -inf in a row without a neighbor; NaN throughout
    a row where a neighbor's distance is NaN. Distances are subtracted before they are divided:
    large ones then lose nothing.
    """
    d = distances if distances.dtype == torch.float64 else distances.float()
    limits = torch.finfo(d.dtype)
    t = _column(temperature, d).clamp(limits.tiny, limits.max)
    absent = (tokens < 0) | (d == INF)
    if d.shape[1] == 0:
        return torch.zeros_like(d)
    nearest = d.detach().masked_fill(absent, INF).amin(1, keepdim=True)
    none = nearest == INF
    z = (nearest.masked_fill(none, 0.0) - d.masked_fill(absent, 0.0)) / t
    # A row of nothing but -inf would turn into NaN, here and in the gradient.
    return z.masked_fill(absent & ~none, -INF).log_softmax(1).masked_fill(none, -INF)


def _spoiled(log_w: Tensor) -> Tensor:
    """(Q, 1) rows where a neighbor's distance is NaN: nothing is known about any token."""
    return log_w.isnan().any(1, keepdim=True)


def knn_softmax(
    distances: Tensor, tokens: Tensor, temperature: float | Tensor, vocab_size: int
) -> Tensor:
    """(Q, V) p_knn: softmax of -distances / temperature, summed by token."""
    log_w = _log_weights(distances, tokens, temperature)
    p_knn = log_w.new_zeros(log_w.shape[0], vocab_size)
    p_knn = p_knn.scatter_add(1, tokens.long().clamp_min(0), log_w.exp())
    return p_knn.masked_fill(_spoiled(log_w), NAN)


def _log_p_knn(log_w: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """(Q, V) log p_knn, each token summed around its own maximum: nothing underflows."""
    index = tokens.long().clamp_min(0)
    lowest = log_w.new_full((log_w.shape[0], vocab_size), -INF)
    peak = lowest.scatter_reduce(1, index, log_w.detach(), "amax")
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
    log_w = _log_weights(distances, tokens, temperature)
    log_p_knn = _log_p_knn(log_w, tokens, lm_logits.shape[1])
    log_p_lm = lm_logits.to(log_w.dtype).log_softmax(1)
    lonely = (log_w == -INF).all(1, keepdim=True)
    weight = _column(lmbda, log_w).expand(log_w.shape[0], 1).masked_fill(lonely, 0.0)
    log_p = torch.logaddexp(torch.log1p(-weight) + log_p_lm, weight.log() + log_p_knn)
    return log_p.masked_fill(_spoiled(log_w), NAN)


def knn_target_log_prob(
    distances: Tensor, tokens: Tensor, targets: Tensor, temperature: float | Tensor
) -> Tensor:
    """(Q,) log p_knn of each row's target; -inf where no neighbor has it."""
    log_w = _log_weights(distances, tokens, temperature)
    other = (tokens.long() != targets.long()[:, None]) | (tokens < 0)
    log_p = log_w.masked_fill(other, -INF).logsumexp(1)
    return log_p.masked_fill(_spoiled(log_w)[:, 0], NAN)


def gather_tokens(values: Tensor, indices: Tensor) -> Tensor:
    """(Q, k) ``values[indices]``, with -1 where the index is -1."""
    if values.shape[0] == 0:
        return torch.full(indices.shape, -1, dtype=values.dtype, device=values.device)
    padding, num_entries = indices == -1, values.shape[0]
    # An index below -1 must not wrap around to a real row; this one lies past the last.
    rows = indices.masked_fill(padding, 0).masked_fill(indices < -1, num_entries)
    tokens = values.index_select(0, rows.reshape(-1)).reshape(rows.shape)
    return tokens.masked_fill(padding, -1)
