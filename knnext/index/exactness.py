"""A check of exactness: sampled queries searched again in float64.

Top-k lists cannot be compared row by row where distances tie or nearly so. What can be said is
this: no row returned may lie farther than the k-th true distance by more than rounding, and no row
may be missing that is nearer than the (k+1)-th by more than rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knnext.index.base import Index
from knnext.index.queries import check_count, check_k, prepare_queries

if TYPE_CHECKING:
    from knnext.datastore import Datastore

# Float32 products in the expanded form are good to about 1e-6 (|q|^2 + |x|^2); tensor cores, which
# CUDA takes for half-precision keys, to 2e-5 max(1, D / 1024) of it.
ROUNDING = 1e-6
TENSOR_CORE_ROUNDING = 2e-5
TIE = 1e-13  # of the same scale: two float64 sums of the same products in another order


@dataclass(frozen=True)
class ExactnessReport:
    """How a search compares with float64 on sampled queries.

    Attributes:
        num_queries: queries sampled.
        k: neighbors compared; less than asked for where the datastore holds fewer rows.
        missing: rows that belong to the k nearest beyond doubt and were not returned.
        wrong: rows returned that beyond doubt do not belong.
        recall: share of the float64 top k that was returned; ties count as found either way.
        max_distance_error: largest difference of a returned distance from float64, as a share
            of |q|^2 + |x|^2.
        min_gap: smallest gap between the k-th and the (k+1)-th float64 distance. Below rounding
            the k-th place is a matter of luck for any float32 search; inf without a (k+1)-th.
        median_gap: its median over the queries.
        ties: queries whose k-th and (k+1)-th float64 distances are equal.
    """

    num_queries: int
    k: int
    missing: int
    wrong: int
    recall: float
    max_distance_error: float
    min_gap: float
    median_gap: float
    ties: int

    @property
    def exact(self) -> bool:
        """Whether nothing is missing and nothing is wrong."""
        return self.missing == 0 and self.wrong == 0


def check_exactness(
    index: Index, queries: Tensor, k: int, *, sample: int = 16, seed: int = 0
) -> ExactnessReport:
    """Search `sample` of the (Q, D) queries with `index` and again in float64, and compare.

    The float64 search reads the whole datastore once and holds a (sample, chunk) matrix.
    """
    datastore = index.datastore
    k = min(check_k(k), datastore.num_entries)
    sample = check_count("sample", sample)
    if k == 0 or queries.shape[0] == 0:
        raise ValueError("check_exactness needs a query and a datastore with rows")
    generator = torch.Generator().manual_seed(seed)
    chosen = (
        torch.randperm(queries.shape[0], generator=generator, device="cpu")[:sample].sort().values
    )
    picked = queries[chosen.to(queries.device)].cpu()
    distances, indices = (t.cpu() for t in index.search(picked, k))
    cosine = index.metric == "cosine"
    rounded = prepare_queries(picked, datastore.dim, datastore.dtype, cosine=cosine).double()
    if cosine:  # of keys and queries of length 1
        distances = distances - 1
    search = _Float64Search(datastore, rounded, k, "ip" if cosine else index.metric)
    return _compare(search, distances.double(), indices, rounding_of(index))


class _Float64Search:
    """The k + 1 best float64 distances of few queries, and the scale of their rounding."""

    def __init__(self, datastore: Datastore, queries: Tensor, k: int, metric: str) -> None:
        self.datastore, self.queries, self.metric, self.k = datastore, queries, metric, k
        self.best = torch.empty(queries.shape[0], 0, dtype=torch.float64, device="cpu")
        self.indices = torch.empty(queries.shape[0], 0, dtype=torch.int64, device="cpu")
        largest = 0.0
        for start, keys, _ in datastore.iter_chunks(32_768):
            keys = keys.double()
            largest = max(largest, float(keys.square().sum(1).max()))
            rows = torch.arange(start, start + keys.shape[0], device="cpu").expand(
                queries.shape[0], -1
            )
            self._keep(self._distances(keys), rows)
        self.scale = queries.square().sum(1) + largest

    def _distances(self, keys: Tensor) -> Tensor:
        if self.metric == "ip":
            return -(self.queries @ keys.T)
        return torch.cdist(self.queries, keys, compute_mode="donot_use_mm_for_euclid_dist").square()

    def _keep(self, distances: Tensor, rows: Tensor) -> None:
        distances = torch.cat([self.best, distances], 1)
        rows = torch.cat([self.indices, rows], 1)
        count = min(self.k + 1, distances.shape[1])
        self.best, order = distances.topk(count, dim=1, largest=False, sorted=True)
        self.indices = rows.gather(1, order)

    def of_rows(self, indices: Tensor) -> Tensor:
        """(q, k) float64 distances of the rows named; +inf at -1."""
        out = torch.full(indices.shape, float("inf"), dtype=torch.float64, device="cpu")
        for q, rows in enumerate(indices):
            real = rows >= 0
            keys = self.datastore.keys[rows[real].sort().values].double()
            diff = keys - self.queries[q]
            values = diff.square().sum(1) if self.metric == "l2" else -(keys @ self.queries[q])
            out[q, real.nonzero()[rows[real].argsort(), 0]] = values
        return out


def _compare(
    search: _Float64Search, distances: Tensor, indices: Tensor, rounding: float
) -> ExactnessReport:
    k, scale = search.k, search.scale[:, None]
    kth = search.best[:, k - 1 : k]
    slack = rounding * scale
    returned = search.of_rows(indices)
    real = indices >= 0
    wrong = ((returned > kth + slack) & real).sum()
    # Rows surely among the k nearest, looked for among those returned.
    sure = search.best[:, :k] < _next_best(search, k) - slack
    found = torch.stack(
        [torch.isin(w, g) for w, g in zip(search.indices[:, :k], indices, strict=True)]
    )
    within = (returned <= kth + TIE * scale).sum(1).clamp_max(k)
    error = ((distances - returned).abs() / scale)[real]
    gap = (_next_best(search, k) - kth)[:, 0]
    return ExactnessReport(
        num_queries=indices.shape[0],
        k=k,
        missing=int((sure & ~found).sum()),
        wrong=int(wrong),
        recall=float(within.double().mean() / k),
        max_distance_error=float(error.max()) if error.numel() else 0.0,
        min_gap=float(gap.min()),
        median_gap=float(gap.median()),
        ties=int((gap <= TIE * search.scale).sum()),
    )


def rounding_of(index: Index) -> float:
    """How good the distances of an index are, as a share of |q|^2 + |x|^2."""
    device = getattr(index, "device", None)
    by_tensor_cores = (
        device is not None
        and torch.device(device).type == "cuda"
        and index.datastore.dtype != torch.float32
        and not getattr(index, "refine", False)
    )
    return (
        TENSOR_CORE_ROUNDING * max(1, index.datastore.dim / 1024) if by_tensor_cores else ROUNDING
    )


def _next_best(search: _Float64Search, k: int) -> Tensor:
    """(q, 1) distance of the nearest row left out, inf where all rows are kept."""
    if search.best.shape[1] > k:
        return search.best[:, k : k + 1]
    return torch.full((search.best.shape[0], 1), float("inf"), dtype=torch.float64, device="cpu")
