"""How perplexity moves with size: the gain of a doubling, and how straight the curve is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.evaluation.bootstrap import Interval, percentile_interval
from knnext.evaluation.perplexity import bootstrap_nll
from knnext.experiments.lab.contrast import Gain
from knnext.experiments.lab.mixture import Split


def per_doubling(
    test: Split, sizes: Sequence[int], log_ps: Sequence[Tensor], resamples: int = 1000
) -> Gain:
    """Gain in log perplexity of twice the size: the slope of the least-squares line in log2 of it.

    Args:
        test: the split that the log-probabilities are of.
        sizes: two at least, not all the same.
        log_ps: (n,) of the mixture at each size.

    Returns:
        The slope with the interval of the slopes over resampled documents.
    """
    x = np.log2(np.asarray(sizes, dtype=np.float64))
    if len(x) < 2 or not np.ptp(x):
        raise ValueError(f"sizes must hold two different ones at least, got {list(sizes)}")
    weights = (x - x.mean()) / np.square(x - x.mean()).sum()
    value = float(weights @ torch.stack([p.double().mean() for p in log_ps]).numpy())
    systems = {str(number): log_p for number, log_p in enumerate(log_ps)}
    samples = bootstrap_nll(test.document_ids, systems, resamples=resamples, seed=0)
    if len(samples) < len(systems):  # fewer than two documents, or a target of probability 0
        return Gain(value, Interval(math.nan, math.nan, 0.95))
    slopes = -(weights @ np.stack([samples[name] for name in systems]))
    return Gain(value, percentile_interval(slopes))


def r_squared(x: Sequence[float] | NDArray[np.float64], y: Sequence[float]) -> float:
    """Share of the variance of y that a straight line in x explains; 1 where y does not vary."""
    if not np.ptp(np.asarray(y, dtype=np.float64)):
        return 1.0
    return float(np.corrcoef(x, y)[0, 1] ** 2)
