"""Zero rows in a datastore: where they stand among the neighbors, and what they take.

An over-allocated store ends in rows that were never written: keys of zeros, and one value that
no text contains. Under the squared distance such a row lies at |q|^2 from a query q, whatever
the keys are. A search keeps it when that is nearer than the k-th real row. Moving all keys and
queries by one vector changes no distance between them, but it moves them against the zero rows:
how much those matter is decided by where the origin lies in the cloud of keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knnext.evaluation.scores import StreamScores
from knnext.experiments.lab.family import row_scores
from knnext.ops import knn_target_log_prob

_BLOCK_ENTRIES = 1 << 24  # queries x rows at a time: 64 MiB of float32


def insert_zero_rows(
    scores: StreamScores, distances: Tensor, rows: int, token: int
) -> StreamScores:
    """What exact search would have found with `rows` more rows, all at one distance of a query.

    Args:
        scores: from an exact search without them, nearest first.
        distances: (n,) float32 distance of those rows from each query; `|q|^2` for zero rows.
        rows: how many there are.
        token: their value.

    Returns:
        Scores without indices. At equal distance rows of the store come first, as in a search of
        a store that ends in the new rows.
    """
    k = scores.k
    place = torch.arange(k, device="cpu")
    nearer = (scores.distances <= distances[:, None]).sum(1, keepdim=True)
    new = (place >= nearer) & (place < nearer + rows)
    source = torch.where(place < nearer, place, (place - rows).clamp_min(0))
    found = scores.distances.gather(1, source)
    tokens = scores.tokens.gather(1, source)
    return replace(
        scores,
        distances=torch.where(new, distances[:, None].to(found.dtype), found),
        tokens=tokens.masked_fill(new, token),
        indices=None,
    )


def places_taken(scores: StreamScores, token: int) -> Tensor:
    """(n,) int64 neighbors of each query that have this value."""
    return (scores.tokens == token).sum(1)


def probability_taken(
    scores: StreamScores, token: int, temperatures: Sequence[float]
) -> dict[float, float]:
    """Mean of p_knn(token) over the queries, at each temperature."""
    wanted = torch.full_like(scores.targets, token)
    return {
        float(t): float(
            knn_target_log_prob(scores.distances, scores.tokens, wanted, float(t))
            .double()
            .exp()
            .mean()
        )
        for t in temperatures
    }


@dataclass(frozen=True)
class Cloud:
    """Where keys lie: their mean (D,), and the mean squared distance from it."""

    mean: Tensor
    variance: float

    @property
    def mean_share(self) -> float:
        """|mean|^2 as a share of the keys' mean squared norm: 0 where the origin is the center of
        the cloud, near 1 where the cloud is far from the origin for its width."""
        square = float(self.mean.square().sum())
        return square / (square + self.variance) if square + self.variance > 0 else 0.0

    def origin(self, mean_share: float) -> Tensor:
        """(D,) the point from which the cloud would have this mean share, on the line through
        its mean and the present origin."""
        if not 0 <= mean_share < 1:
            raise ValueError(f"mean_share must lie in [0, 1), got {mean_share}")
        norm = self.mean.norm()
        direction = (
            self.mean / norm
            if norm > 0
            else torch.eye(1, self.mean.shape[0], dtype=torch.float32, device="cpu")[0]
        )
        return self.mean - direction * math.sqrt(self.variance * mean_share / (1 - mean_share))


def cloud_of(keys: Tensor) -> Cloud:
    """Mean and width of (N, D) keys."""
    keys = keys.double()
    mean = keys.mean(0)
    return Cloud(mean.float(), float((keys - mean).square().sum(1).mean()))


def depths(queries: Tensor, keys: Tensor, origins: Tensor) -> Tensor:
    """(q, o) float64 share of the (N, D) keys that lie nearer to each query than each origin.

    A row at the origin is among the k nearest of N real rows exactly where its depth is below
    k / N, and then it and its like take the last `k - depth N` places.
    """
    queries, keys, origins = queries.float(), keys.float(), origins.float()
    out = torch.empty(queries.shape[0], origins.shape[0], dtype=torch.float64, device="cpu")
    step = max(1, _BLOCK_ENTRIES // keys.shape[0])
    for begin in range(0, queries.shape[0], step):
        part = queries[begin : begin + step]
        scores = row_scores(part, keys, "l2")
        thresholds = row_scores(part, origins, "l2")
        for column in range(origins.shape[0]):
            nearer = scores > thresholds[:, column, None]
            out[begin : begin + step, column] = nearer.sum(1).double() / keys.shape[0]
    return out


def places_share(depth: Tensor, kept_share: float) -> float:
    """Mean share of the k places that rows of these depths take, where k is `kept_share` of the
    real rows and there are k or more such rows."""
    return float((1 - depth / kept_share).clamp_min(0).mean())
