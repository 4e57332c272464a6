"""Pearson's and Spearman's correlation over tokens, with intervals over documents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from knnext.evaluation.bootstrap import FloatArray, Interval, percentile_interval, resample_means


@dataclass(frozen=True)
class Correlation:
    """One coefficient and its 95 % interval by bootstrap over documents."""

    value: float
    interval: Interval

    def __str__(self) -> str:
        low, high = self.interval.low, self.interval.high
        if not (math.isfinite(low) and math.isfinite(high)):
            return f"{self.value:.2f}"
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"


def pearson(
    x: Tensor, y: Tensor, document_ids: Tensor, *, resamples: int = 1000, seed: int = 0
) -> Correlation:
    """Of (n,) x and y; nan where one of them is constant.

    A resample is a draw of documents, and its correlation follows from the sums of x, y and their
    products in each.
    """
    if not x.shape == y.shape == document_ids.shape:
        raise ValueError(
            f"x, y and document_ids must have one shape, got {tuple(x.shape)}, {tuple(y.shape)} "
            f"and {tuple(document_ids.shape)}"
        )
    # Centred and scaled: the sums of squares then lose nothing.
    x, y = (_standard(one.double()) for one in (x, y))
    _, ids = document_ids.unique(return_inverse=True)
    moments = torch.stack([x, y, x * x, y * y, x * y], 1)
    sums = torch.zeros(int(ids.max()) + 1, 5, dtype=torch.float64, device="cpu").index_add_(
        0, ids, moments
    )
    value = float(_coefficient(moments.mean(0).numpy()[None])[0])
    draws = resample_means(sums.numpy(), ids.bincount().numpy(), resamples=resamples, seed=seed)
    samples = _coefficient(draws) if len(sums) > 1 else np.empty(0)
    return Correlation(value, percentile_interval(samples))


def spearman(
    x: Tensor, y: Tensor, document_ids: Tensor, *, resamples: int = 1000, seed: int = 0
) -> Correlation:
    """Pearson's of the ranks; ranks are those of the whole sample in every resample."""
    return pearson(ranks(x), ranks(y), document_ids, resamples=resamples, seed=seed)


def ranks(values: Tensor) -> Tensor:
    """(n,) float64 ranks from 0; equal values share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return (first + (counts - 1) / 2).double()[inverse]


def _standard(values: Tensor) -> Tensor:
    centred = values - values.mean()
    return centred / centred.square().mean().sqrt().clamp_min(1e-300)


def _coefficient(moments: FloatArray) -> FloatArray:
    """(m,) correlations from (m, 5) means of x, y, xx, yy and xy."""
    x, y, xx, yy, xy = moments.T
    spread = np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-18, (xy - x * y) / np.sqrt(spread), np.nan)
