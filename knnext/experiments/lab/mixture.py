"""Fitting a component's weight on the validation split, and what the mixture gives on test.

Both ways of reporting are computed. The clean one: temperature and lmbda are fitted on valid, the
figures are of test, per token, with a bootstrap over documents. The paper's: perplexity per word,
temperature and lmbda fitted on the very split that is reported (spec: 200 weights from 0.001 to
0.999, a fit of its own for each temperature).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnext.evaluation.bootstrap import Interval, percentile_interval
from knnext.evaluation.perplexity import TextCounts, bootstrap_nll
from knnext.evaluation.scores import mix_log_probs
from knnext.evaluation.tune import PAPER_LMBDAS, mixture_nll

#: Every log p_knn below this counts as this: the published code's floor.
FLOOR = -10_000.0
DEFAULT_TEMPERATURES: tuple[float, ...] = tuple(np.geomspace(0.1, 100, 31).tolist())

_EM_STEPS, _EM_TOLERANCE = 2000, 1e-10


@dataclass
class Split:
    """The targets of one split and what the LM gives them.

    `log_p_lm` (n,) float64; `targets`, `document_ids` (n,) int64; `counts`: the denominators.
    """

    name: str
    log_p_lm: Tensor
    targets: Tensor
    document_ids: Tensor
    counts: TextCounts


#: log p of every target of a split under a component at a temperature, (n,) float64, by the
#: split's name. Components without a temperature are called with 1 and ignore it.
LogP = Callable[[str, float], Tensor]


@dataclass(frozen=True)
class Mixture:
    """What one component adds to the LM.

    Attributes:
        temperature, lmbda: fitted on valid.
        base, alone, mixture, oracle: perplexity per token on test; `alone` is None where the
            component gives some target probability 0, else it is what exp says.
        gain: log perplexity of the base minus that of the mixture, on test: above zero it helps.
        interval: of `gain`, by paired bootstrap over documents.
        wins: share of the test targets to which the component gives more than the LM.
        paper: the paper's way of reporting, see `paper_way`.
    """

    temperature: float
    lmbda: float
    base: float
    alone: float | None
    mixture: float
    oracle: float
    gain: float
    interval: Interval
    wins: float
    num_tokens: int
    num_documents: int
    paper: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def fit_lmbda(log_p_lm: Tensor, log_p_other: Tensor) -> tuple[float, float]:
    """(lmbda, nll): the weight in [0, 1] with the lowest loss; the loss is convex in it."""
    low, high = 0.0, 1.0
    for _ in range(4):  # each round narrows the bracket sixteen-fold
        grid = np.linspace(low, high, 33)
        nll = mixture_nll(log_p_lm.double(), log_p_other.double(), grid)
        best = int(nll.argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 32)])
    return float(grid[best]), float(nll[best])


def fit(
    valid: Split, log_p: LogP, temperatures: Sequence[float] = (1.0,)
) -> tuple[float, float, float]:
    """(temperature, lmbda, nll) with the lowest loss on valid, over a grid of temperatures."""
    tried = []
    for temperature in temperatures:
        lmbda, nll = fit_lmbda(valid.log_p_lm, log_p(valid.name, temperature))
        tried.append((nll, temperature, lmbda))
    nll, temperature, lmbda = min(tried)
    return temperature, lmbda, nll


def mix(
    valid: Split,
    test: Split,
    log_p: LogP,
    temperatures: Sequence[float] = (1.0,),
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Mixture:
    """Fit temperature and lmbda on valid and report the component on test."""
    temperature, lmbda, _ = fit(valid, log_p, temperatures)
    result = report(test, log_p(test.name, temperature), lmbda, temperature, resamples, seed)
    result.paper.update(paper_way(test, log_p, temperatures))
    return result


def report(
    test: Split,
    log_p: Tensor,
    lmbda: float,
    temperature: float = 1.0,
    resamples: int = 1000,
    seed: int = 0,
) -> Mixture:
    """The figures of a component on test at a given weight; `paper` is left empty."""
    log_p_lm, log_p = test.log_p_lm.double(), log_p.double()
    systems = {
        "base": log_p_lm,
        "mixture": mix_log_probs(log_p_lm, log_p, lmbda),
        "alone": log_p,
        "oracle": torch.maximum(log_p_lm, log_p),
    }
    nll = {name: -float(one.mean()) for name, one in systems.items()}
    return Mixture(
        temperature=float(temperature),
        lmbda=float(lmbda),
        base=math.exp(nll["base"]),
        alone=math.exp(nll["alone"]) if nll["alone"] < 700 else None,
        mixture=math.exp(nll["mixture"]),
        oracle=math.exp(nll["oracle"]),
        gain=nll["base"] - nll["mixture"],
        interval=difference(test, systems["mixture"], log_p_lm, resamples, seed),
        wins=float((log_p > log_p_lm).double().mean()),
        num_tokens=test.counts.tokens,
        num_documents=test.counts.documents,
    )


def difference(
    test: Split, better: Tensor, worse: Tensor, resamples: int = 1000, seed: int = 0
) -> Interval:
    """95 % interval of mean(better - worse), (n,) log-probabilities, by bootstrap over documents.

    Paired: both are measured on the same draws. Above zero, `better` gives the targets more.
    """
    samples = bootstrap_nll(
        test.document_ids, {"a": better, "b": worse}, resamples=resamples, seed=seed
    )
    if set(samples) != {"a", "b"}:
        return percentile_interval(np.empty(0))
    return percentile_interval(samples["b"] - samples["a"])


def paper_way(split: Split, log_p: LogP, temperatures: Sequence[float] = (1.0,)) -> dict[str, Any]:
    """Perplexities per word on `split`, temperature and lmbda fitted on `split` itself.

    log p below -10,000 counts as -10,000, as in the published code. Where the words are not known
    the figures are per token, and `per` says so.
    """
    log_p_lm = split.log_p_lm.double()
    ratio = split.counts.tokens / (split.counts.words or split.counts.tokens)
    best: dict[str, Any] = {}
    for temperature in temperatures:
        other = log_p(split.name, temperature).double().clamp_min(FLOOR)
        nll = mixture_nll(log_p_lm, other, PAPER_LMBDAS)
        chosen = int(nll.argmin())
        if best and nll[chosen] >= best["nll"]:
            continue
        best = {
            "nll": float(nll[chosen]),
            "temperature": float(temperature),
            "lmbda": float(PAPER_LMBDAS[chosen]),
            "oracle": _exp(-ratio * float(torch.maximum(log_p_lm, other).mean())),
            "alone": _exp(-ratio * float(other.mean())),
        }
    base = _exp(-ratio * float(log_p_lm.mean()))
    per = "word" if split.counts.words else "token"
    return {
        "per": per,
        "split": split.name,
        "base": base,
        **best,
        "mixture": _exp(ratio * best.pop("nll")),
    }


def fit_weights(log_ps: Tensor) -> Tensor:
    """(m,) weights on the simplex that maximize mean log sum_i w_i p_i, by EM from equal weights.

    Args:
        log_ps: (m, n) log-probabilities of m components; -inf allowed where another is finite.
    """
    p = (log_ps.double() - log_ps.double().amax(0)).exp()
    weights = torch.full((p.shape[0],), 1 / p.shape[0], dtype=torch.float64, device="cpu")
    for _ in range(_EM_STEPS):
        share = weights[:, None] * p
        new = (share / share.sum(0)).mean(1)
        moved = float((new - weights).abs().max())
        weights = new
        if moved < _EM_TOLERANCE:
            break
    return weights


def mix_many(log_ps: Tensor, weights: Tensor) -> Tensor:
    """(n,) log of the weighted sum of (m, n) log-probabilities."""
    return torch.logsumexp(log_ps.double() + weights.double().log()[:, None], 0)


def seed_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, and sample standard deviation, of one figure over seeds."""
    array = np.asarray(values, dtype=np.float64)
    deviation = float(array.std(ddof=1)) if array.size > 1 else float("nan")
    return {"mean": float(array.mean()), "std": deviation, "seeds": float(array.size)}


def by_name(splits: Sequence[Split], log_ps: Mapping[str, Tensor]) -> LogP:
    """A component without a temperature from its log-probabilities by split name."""
    missing = [s.name for s in splits if s.name not in log_ps]
    if missing:
        raise ValueError(f"log_ps lacks {', '.join(missing)}")
    return lambda name, _temperature: log_ps[name]


def _exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None
