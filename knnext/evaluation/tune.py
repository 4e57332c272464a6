"""Fitting temperature and lmbda to a validation split, from one stored search.

For each temperature the neighbors' log-probabilities of the targets are computed once. The mixture
is then linear in lmbda, so the whole row of weights costs one logarithm per token and weight.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.evaluation.scores import StreamScores, check_lmbda, check_temperature, mix_log_probs
from knnext.progress import progress

FloatArray = NDArray[np.float64]

# The grids of "Why do Nearest Neighbor Language Models Work?" (arXiv:2301.02828) and its code:
# temperatures 0.1 to 3.0 by 0.1, and 200 weights for each of them.
PAPER_TEMPERATURES: FloatArray = np.arange(1, 31) / 10
PAPER_LMBDAS: FloatArray = np.linspace(0.001, 0.999, 200)

# Other models have keys of other norms and want temperatures from tenths to hundreds. Weight 0 is
# in the grid, so the fit is never worse than the base model.
DEFAULT_TEMPERATURES: FloatArray = np.geomspace(0.1, 1000, 41)
DEFAULT_LMBDAS: FloatArray = np.linspace(0, 0.99, 100)

_BLOCK_ENTRIES = 1 << 18  # tokens x weights at a time: 2 MiB, which stays in the cache
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class TuneResult:
    """The best temperature and lmbda, and the surface they were chosen from.

    Attributes:
        temperature, lmbda: the best pair; off the grid where it was refined.
        nll: nats per token at the best pair.
        base_nll: nats per token of the model alone.
        temperatures: (T,) grid, ascending.
        lmbdas: (L,) grid, ascending.
        surface: (T, L) nats per token.
        edges: the ends of the grid at which its best point lies, for instance
            `"highest temperature"`. The optimum may then lie outside. lmbda = 0 or 1 is no edge.
        num_tokens: targets that the fit used.
        seconds: time it took.
    """

    temperature: float
    lmbda: float
    nll: float
    base_nll: float
    temperatures: FloatArray
    lmbdas: FloatArray
    surface: FloatArray
    edges: tuple[str, ...]
    num_tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """Per token, at the best pair."""
        return math.exp(self.nll)

    @property
    def base_perplexity(self) -> float:
        """Per token, of the model alone."""
        return math.exp(self.base_nll)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinite entries of the surface become None."""
        return {
            "temperature": self.temperature,
            "lmbda": self.lmbda,
            "perplexity": self.perplexity,
            "base_perplexity": self.base_perplexity,
            "edges": list(self.edges),
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "temperatures": self.temperatures.tolist(),
            "lmbdas": self.lmbdas.tolist(),
            "nll": [[v if math.isfinite(v) else None for v in row] for row in self.surface],
        }


def tune(
    scores: StreamScores,
    temperatures: Sequence[float] | FloatArray = DEFAULT_TEMPERATURES,
    lmbdas: Sequence[float] | FloatArray = DEFAULT_LMBDAS,
    *,
    refine: bool = True,
) -> TuneResult:
    """Find the temperature and lmbda with the lowest perplexity over the scored tokens.

    Args:
        scores: of the validation split, never of the split that will be reported.
        temperatures, lmbdas: the grid; all pairs are evaluated.
        refine: go on from the best grid point, within the neighboring temperatures: golden
            section in log temperature, and for each the exact best weight of the grid's range
            (the loss is convex in it).
    """
    start = time.perf_counter()
    grid_t, grid_l = _check_grid(scores, temperatures, lmbdas)
    loss = _Loss(scores)
    surface = np.empty((grid_t.size, grid_l.size))
    for row, temperature in enumerate(progress(grid_t.tolist(), "tuning", unit="temperatures")):
        surface[row] = loss.over_lmbdas(temperature, grid_l)
    best_t, best_l = np.unravel_index(int(surface.argmin()), surface.shape)
    found = (float(grid_t[best_t]), float(grid_l[best_l]), float(surface[best_t, best_l]))
    if refine:
        found = min(found, _refine(loss, grid_t, grid_l, int(best_t)), key=lambda f: f[2])
    return TuneResult(
        *found,
        base_nll=loss.base_nll,
        temperatures=grid_t,
        lmbdas=grid_l,
        surface=surface,
        edges=_edges(grid_t, grid_l, int(best_t), int(best_l)),
        num_tokens=scores.num_tokens,
        seconds=time.perf_counter() - start,
    )


def mixture_nll(log_p_lm: Tensor, log_p_knn: Tensor, lmbdas: FloatArray) -> FloatArray:
    """(L,) mean of -log((1 - lmbda) p_lm + lmbda p_knn) over tokens, for each weight.

    Both (n,) float64 log-probabilities are divided by the larger of the two, token by token. One
    of them is then 1, nothing underflows that matters, and the mixture inside the logarithm is
    linear in lmbda. log_p_knn may be -inf; at lmbda = 1 the result may be +inf.
    """
    # The bound keeps -inf - -inf, a target that neither thinks possible, from being nan.
    largest = torch.maximum(log_p_lm, log_p_knn).clamp_min(-1e30)
    lm, knn = (log_p_lm - largest).exp(), (log_p_knn - largest).exp()
    offset = float(largest.mean())
    # numpy's logarithm uses one thread. torch's wakes several for each of these small blocks,
    # which is no faster, and 16 times slower where the cores are shared with other work.
    base, step = lm.numpy(), (knn - lm).numpy()
    block = max(1, _BLOCK_ENTRIES // base.size)
    nll = np.empty(len(lmbdas))
    with np.errstate(divide="ignore"):  # log(0) is meant to be -inf
        for begin in range(0, nll.size, block):
            mixed = np.multiply.outer(lmbdas[begin : begin + block], step)
            mixed += base
            nll[begin : begin + block] = -np.log(mixed, out=mixed).mean(1) - offset
    # 1 - 1 + p loses a tiny p; the ends are the models themselves.
    nll[lmbdas == 0] = -float(log_p_lm.mean())
    nll[lmbdas == 1] = -float(log_p_knn.mean())
    return nll


class _Loss:
    """Nats per token at a temperature and lmbda."""

    def __init__(self, scores: StreamScores) -> None:
        self.scores = scores
        self.log_p_lm = scores.log_p_lm.double()
        self.base_nll = -float(self.log_p_lm.mean())
        # Rows without neighbors are the model's alone whatever lmbda is.
        self.has_neighbors = scores.has_neighbors

    def log_p_knn(self, temperature: float) -> Tensor:
        log_p = self.scores.log_p_knn(temperature)
        return torch.where(self.has_neighbors, log_p, self.log_p_lm)

    def over_lmbdas(self, temperature: float, lmbdas: FloatArray) -> FloatArray:
        return mixture_nll(self.log_p_lm, self.log_p_knn(temperature), lmbdas)

    def best_lmbda(self, temperature: float, low: float, high: float) -> tuple[float, float]:
        """The weight in [low, high] with the lowest loss, and the loss there."""
        log_p_knn = self.log_p_knn(temperature)

        def at(lmbda: float) -> float:
            return -float(mix_log_probs(self.log_p_lm, log_p_knn, lmbda).mean())

        return _golden_section(at, low, high, steps=24)


def _refine(
    loss: _Loss, temperatures: FloatArray, lmbdas: FloatArray, best: int
) -> tuple[float, float, float]:
    """(temperature, lmbda, nll) of a search between the neighbors of a grid temperature."""
    low = float(temperatures[max(best - 1, 0)])
    high = float(temperatures[min(best + 1, temperatures.size - 1)])
    ends = float(lmbdas[0]), float(lmbdas[-1])

    def at(log_t: float) -> float:
        return loss.best_lmbda(math.exp(log_t), *ends)[1]

    log_t, _ = _golden_section(at, math.log(low), math.log(high), steps=12)
    temperature = min(max(math.exp(log_t), low), high)
    return (temperature, *loss.best_lmbda(temperature, *ends))


def _golden_section(
    at: Callable[[float], float], low: float, high: float, *, steps: int
) -> tuple[float, float]:
    """The lowest point of a function with one valley, and its value there."""
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_a, at_b = at(a), at(b)
    for _ in range(steps):
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - _GOLDEN * (high - low)
            at_a = at(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + _GOLDEN * (high - low)
            at_b = at(b)
    return (a, at_a) if at_a <= at_b else (b, at_b)


def _check_grid(
    scores: StreamScores,
    temperatures: Sequence[float] | FloatArray,
    lmbdas: Sequence[float] | FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Both grids sorted and checked."""
    if scores.num_tokens == 0:
        raise ValueError("scores hold no tokens, there is nothing to tune on")
    grids = []
    for name, values in (("temperatures", temperatures), ("lmbdas", lmbdas)):
        grid = np.unique(np.asarray(values, dtype=np.float64).ravel())
        if grid.size == 0:
            raise ValueError(f"{name} must hold at least one value, got none")
        grids.append(grid)
    for temperature in grids[0].tolist():
        check_temperature(temperature)
    for lmbda in grids[1].tolist():
        check_lmbda(lmbda)
    return grids[0], grids[1]


def _edges(
    temperatures: FloatArray, lmbdas: FloatArray, best_t: int, best_l: int
) -> tuple[str, ...]:
    found = []
    for name, grid, best in (("temperature", temperatures, best_t), ("lmbda", lmbdas, best_l)):
        if grid.size == 1 or (name == "lmbda" and grid[best] in (0.0, 1.0)):
            continue
        if best in (0, grid.size - 1):
            found.append(f"{'lowest' if best == 0 else 'highest'} {name}")
    return tuple(found)
