"""One component over a grid of temperatures, from one search: lmbda fitted anew at each, and held.

Which temperature looks best, and which of two components looks better at one, depends on whether
lmbda follows. The paper fits it anew at each temperature. Held at its best value for t = 1, it
makes temperatures that would want another weight look worse than they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from knnext.evaluation.scores import mix_log_probs
from knnext.evaluation.tune import mixture_nll
from knnext.experiments.lab.contrast import tabulate
from knnext.experiments.lab.mixture import LogP, Split, fit, fit_lmbda, paper_way


@dataclass(frozen=True)
class Sweep:
    """Curves over T temperatures; perplexities are per token on test.

    Attributes:
        temperatures: ascending, 1.0 among them.
        lmbdas: fitted on valid at each temperature.
        valid_nll: nats per token on valid with these.
        perplexity: with these.
        held: with lmbda held at its fit for t = 1.
        held_valid_nll: nats per token on valid with lmbda held.
        paper: the paper's way at each temperature, see `mixture.paper_way`; perplexity or None.
        log_p: the component, every value computed.
        test: the split that is reported.
    """

    temperatures: list[float]
    lmbdas: list[float]
    valid_nll: list[float]
    perplexity: list[float]
    held: list[float]
    held_valid_nll: list[float]
    paper: list[float | None]
    log_p: LogP
    test: Split

    @property
    def best(self) -> int:
        """Place of the temperature with the lowest loss on valid."""
        return int(np.argmin(self.valid_nll))

    @property
    def held_best(self) -> int:
        """The same with lmbda held."""
        return int(np.argmin(self.held_valid_nll))

    @property
    def paper_best(self) -> int | None:
        """Place of the lowest figure of the paper's way."""
        known = [(value, place) for place, value in enumerate(self.paper) if value is not None]
        return min(known)[1] if known else None

    @property
    def one(self) -> int:
        """Place of t = 1."""
        return self.temperatures.index(1.0)

    def best_within(self, low: float, high: float) -> int:
        """Place of the temperature in [low, high] with the lowest loss on valid."""
        inside = [i for i, t in enumerate(self.temperatures) if low <= t <= high]
        return min(inside, key=self.valid_nll.__getitem__)

    def mixed(self, place: int) -> Tensor:
        """(n,) log p of the test targets under the mixture at a temperature, lmbda fitted there."""
        log_p = self.log_p(self.test.name, self.temperatures[place])
        return mix_log_probs(self.test.log_p_lm.double(), log_p, self.lmbdas[place])


def sweep(valid: Split, test: Split, log_p: LogP, temperatures: Sequence[float]) -> Sweep:
    """All curves of a component. Its temperatures are computed once: nothing is searched here.

    ValueError where a temperature is not positive or t = 1 is missing.
    """
    grid = sorted(set(temperatures))
    if 1.0 not in grid or grid[0] <= 0:
        raise ValueError(f"temperatures must be positive and hold 1.0, got {grid}")
    known = tabulate(log_p, (valid, test), grid)
    fits = [fit_lmbda(valid.log_p_lm, known(valid.name, t)) for t in grid]
    held = fits[grid.index(1.0)][0]

    def nll(split: Split, temperature: float, lmbda: float) -> float:
        log_p_knn = known(split.name, temperature)
        return float(mixture_nll(split.log_p_lm.double(), log_p_knn, np.array([lmbda]))[0])

    return Sweep(
        temperatures=grid,
        lmbdas=[lmbda for lmbda, _ in fits],
        valid_nll=[loss for _, loss in fits],
        perplexity=[_exp(nll(test, t, lmbda)) for t, (lmbda, _) in zip(grid, fits, strict=True)],
        held=[_exp(nll(test, t, held)) for t in grid],
        held_valid_nll=[nll(valid, t, held) for t in grid],
        paper=[paper_way(test, known, (t,))["mixture"] for t in grid],
        log_p=known,
        test=test,
    )


def refine(
    valid: Split, log_p: LogP, temperatures: Sequence[float], points: int = 7
) -> list[float]:
    """The grid with some more temperatures between the neighbors of the best on valid.

    A coarse grid makes figures jump where the best moves by one place.
    """
    grid = sorted(set(temperatures))
    place = grid.index(fit(valid, log_p, grid)[0])
    ends = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
    return sorted({*grid, *np.geomspace(*ends, points + 2)[1:-1].tolist()})


def orders_differ(sweeps: Sequence[Sweep], low: float, high: float) -> tuple[int, int]:
    """(how many, of how many) temperatures in [low, high] at which the components stand in another
    order when lmbda is held than when it is fitted there."""
    inside = [i for i, t in enumerate(sweeps[0].temperatures) if low <= t <= high]

    def order(place: int, curves: list[list[float]]) -> list[int]:
        return sorted(range(len(curves)), key=lambda number: curves[number][place])

    fitted, held = [s.perplexity for s in sweeps], [s.held for s in sweeps]
    return sum(order(i, fitted) != order(i, held) for i in inside), len(inside)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
