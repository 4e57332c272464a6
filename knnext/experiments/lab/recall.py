"""How much of the true neighborhood an approximate search kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from knnext.evaluation.scores import StreamScores

# Of the k-th distance: the same pair scored by two kernels differs by float32 rounding.
ROUNDING = 1e-5


def recall(found: StreamScores, exact: StreamScores) -> Tensor:
    """(n,) share of each query's k true neighbors that a search kept.

    Both hold real distances, so no row numbers are needed: what lies within the k-th true distance
    belongs to the true k nearest, and rows that tie there are as good as each other.

    Args:
        found: mask of an index, real scores.
        exact: of the same queries and k, all rows searched.
    """
    if found.distances.shape != exact.distances.shape:
        raise ValueError(
            f"found and exact must be searches of the same queries and k, got "
            f"{tuple(found.distances.shape)} and {tuple(exact.distances.shape)}"
        )
    real = exact.tokens >= 0
    last = exact.distances.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    limit = last + ROUNDING * last.abs()
    within = (found.tokens >= 0) & (found.distances <= limit)
    wanted = real.sum(1)
    return torch.minimum(within.sum(1), wanted).double() / wanted.clamp_min(1)


def thin(scores: StreamScores, share: float, seed: int = 0) -> StreamScores:
    """The same neighbors with a share of each query's dropped by lot, as if never found."""
    generator = torch.Generator().manual_seed(seed)
    dropped = (
        torch.rand(scores.distances.shape, generator=generator, dtype=torch.float32, device="cpu")
        >= share
    )
    return replace(
        scores,
        distances=scores.distances.masked_fill(dropped, torch.inf),
        tokens=scores.tokens.masked_fill(dropped, -1),
        indices=None,
    )
