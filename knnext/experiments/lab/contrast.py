"""Two components compared on the same targets: which mixture is better, by how much, how surely.

Differences are of log-probabilities per token on test, temperature and lmbda fitted on valid, with
a bootstrap over documents that draws the same documents for all that is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from knnext.evaluation.bootstrap import Interval
from knnext.evaluation.scores import mix_log_probs
from knnext.experiments.lab.mixture import (
    LogP,
    Mixture,
    Split,
    difference,
    fit_lmbda,
    paper_way,
    report,
)
from knnext.experiments.lab.results import percent_interval


@dataclass(frozen=True)
class Fitted:
    """A component mixed with the LM, fitted on valid.

    Attributes:
        mixture: its figures on test.
        log_p: (n,) float64, what the mixture gives to each target of test.
        valid_nll: the loss that the fit reached.
        curve: perplexity on test at each temperature tried, lmbda fitted on valid for each.
    """

    mixture: Mixture
    log_p: Tensor
    valid_nll: float
    curve: dict[float, float]


@dataclass(frozen=True)
class Gain:
    """A mean difference of log-probabilities in nats per token, above zero where the first is
    better, with its 95 % interval over documents."""

    value: float
    interval: Interval

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {"value": self.value, "low": self.interval.low, "high": self.interval.high}

    def __str__(self) -> str:
        """As a change of perplexity: `-1.2 % [-1.9, -0.6]`."""
        return percent_interval(self.value, self.interval.low, self.interval.high)


def fit_component(
    valid: Split,
    test: Split,
    log_p: LogP,
    temperatures: Sequence[float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Fitted:
    """Fit temperature and lmbda on valid; figures of test, the curve, and the paper's way."""
    known = tabulate(log_p, (valid, test), temperatures)
    fits = []
    curve = {}
    for temperature in temperatures:
        lmbda, nll = fit_lmbda(valid.log_p_lm, known(valid.name, temperature))
        fits.append((nll, temperature, lmbda))
        mixed = mix_log_probs(test.log_p_lm, known(test.name, temperature), lmbda)
        curve[float(temperature)] = math.exp(-float(mixed.mean()))
    nll, temperature, lmbda = min(fits)
    chosen = known(test.name, temperature)
    figures = report(test, chosen, lmbda, temperature, resamples, seed)
    figures.paper.update(paper_way(test, known, temperatures))
    return Fitted(figures, mix_log_probs(test.log_p_lm, chosen, lmbda), nll, curve)


def tabulate(log_p: LogP, splits: Sequence[Split], temperatures: Sequence[float]) -> LogP:
    """The same component with every value computed beforehand, so that what it was computed from
    (1024 neighbors a token) can be let go."""
    table: dict[tuple[str, float], Tensor] = {
        (split.name, temperature): log_p(split.name, temperature)
        for split in splits
        for temperature in temperatures
    }
    return lambda name, temperature: table[name, temperature]


def advantage(
    test: Split, better: Tensor, worse: Tensor, resamples: int = 1000, seed: int = 0
) -> Gain:
    """How much more of log-probability `better` gives to the targets of test than `worse`."""
    interval = difference(test, better, worse, resamples, seed)
    return Gain(float((better - worse).mean()), interval)


def difference_in_differences(
    test: Split,
    treated: tuple[Tensor, Tensor],
    control: tuple[Tensor, Tensor],
    resamples: int = 1000,
    seed: int = 0,
) -> Gain:
    """The advantage within `treated` minus the advantage within `control`.

    Args:
        treated, control: pairs (better, worse) of (n,) log-probabilities of the same targets.
    """
    first, second = treated[0] - treated[1], control[0] - control[1]
    return advantage(test, first, second, resamples, seed)


def by_name(gains: dict[str, Gain]) -> dict[str, Any]:
    """Plain values for JSON."""
    return {name: gain.to_dict() for name, gain in gains.items()}
