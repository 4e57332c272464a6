"""Confidence intervals over documents.

Tokens of one document rise and fall together, so resampling tokens would give intervals that are
far too narrow. Whole documents are drawn with replacement instead, and every figure of a
resample is computed from the same draw: differences between systems are paired.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

#: Intervals from fewer documents than this are mostly too narrow, and are marked.
FEW_DOCUMENTS = 20

_BLOCK_ENTRIES = 4_000_000  # draws x documents held at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """A two-sided interval `[low, high]` that holds with probability `level`."""

    low: float
    high: float
    level: float


def resample_means(
    sums: FloatArray, counts: NDArray[np.int64], *, resamples: int = 1000, seed: int = 0
) -> FloatArray:
    """Ratios `sum of sums / sum of counts` over documents drawn with replacement.

    Args:
        sums: (documents, m) per-document totals of m quantities, finite.
        counts: (documents,) weights, for instance tokens; at least one is positive.
        resamples: number of draws R.
        seed: the same seed gives the same draws.

    Returns:
        (R, m) float64.
    """
    documents = _check(sums, counts, resamples)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_ENTRIES // documents)
    means = np.empty((resamples, sums.shape[1]))
    share = np.full(documents, 1.0 / documents)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        # How often each document is drawn: all that matters of a draw with replacement.
        draws = rng.multinomial(documents, share, size=stop - start).astype(np.float64)
        weights = draws @ counts
        # A draw made of empty documents only has no mean; it says nothing and is left as nan.
        with np.errstate(invalid="ignore", divide="ignore"):
            means[start:stop] = (draws @ sums) / weights[:, None]
    return means


def percentile_interval(samples: FloatArray, level: float = 0.95) -> Interval:
    """The central share `level` of (R,) samples; nan where no finite interval exists."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    usable = samples[~np.isnan(samples)]
    if usable.size == 0 or not np.isfinite(usable).all():
        return Interval(float("nan"), float("nan"), level)
    tail = (1 - level) / 2
    low, high = np.quantile(usable, [tail, 1 - tail])
    return Interval(float(low), float(high), level)


def _check(sums: FloatArray, counts: NDArray[np.int64], resamples: int) -> int:
    if sums.ndim != 2 or counts.shape != sums.shape[:1]:
        raise ValueError(
            f"sums must be (documents, m) and counts (documents,), got {sums.shape} and "
            f"{counts.shape}"
        )
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if counts.size == 0 or counts.sum() <= 0:
        raise ValueError("counts must hold at least one positive weight, got none")
    return int(counts.size)
