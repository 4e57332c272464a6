"""How much of the kNN-LM's gain a trained replacement of the datastore recovers.

Both are measured on the same test tokens: the replacement once for each seed, the exact kNN-LM
once. The share is a ratio of gains in log perplexity, and its interval comes from the same draws of
documents for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnext.evaluation.bootstrap import Interval, percentile_interval
from knnext.evaluation.perplexity import bootstrap_nll
from knnext.evaluation.scores import mix_log_probs
from knnext.experiments.lab import Lab
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.mixture import (
    DEFAULT_TEMPERATURES,
    LogP,
    Mixture,
    difference,
    mix,
    paper_way,
    report,
    seed_interval,
)
from knnext.experiments.lab.results import Agreement, percent_interval
from knnext.experiments.lab.training import Trained


@dataclass(frozen=True)
class Replacement:
    """A component that replaces the datastore, or the datastore itself, over its seeds.

    Attributes:
        mixtures: with the LM, one a seed; lmbda of each fitted on valid.
        log_p: (n,) float64 log p of the test targets in the mixture, the mean over seeds.
        gain, interval: the mean gain over seeds and its interval over documents.
        share, share_interval: of the kNN-LM's gain.
        paper_share: the same by perplexities per word, tuned on test, as the paper counts.
        valid_nll: nats a token of the mixture on valid, the mean over seeds: which of several
            replacements is the best is read here, and not from what is reported.
    """

    mixtures: list[Mixture]
    log_p: Tensor
    gain: float
    interval: Interval
    share: float
    share_interval: Interval
    paper_share: float
    valid_nll: float = math.nan

    def row(self, **first: Any) -> dict[str, Any]:
        """A row of a results table: `first`, then the figures; perplexities are test's."""
        mixed = seed_interval([m.mixture for m in self.mixtures])
        share = self.share_interval
        return {
            **first,
            "alone": self.mean("alone"),
            "lmbda": self.mean("lmbda"),
            "mixture": mixed["mean"],
            "std of seeds": mixed["std"],
            "change": percent_interval(self.gain, self.interval.low, self.interval.high),
            "recovers": share_text(self.share, share),
            "oracle": self.mean("oracle"),
            "paper's way": self.paper("mixture"),
            "recovers, paper's way": f"{100 * self.paper_share:.0f} %",
        }

    def mean(self, name: str) -> float | None:
        """Of one figure of the mixtures over seeds; None where one has none."""
        return _mean([getattr(m, name) for m in self.mixtures])

    def paper(self, name: str) -> float | None:
        """Of one figure of the paper's way over seeds."""
        return _mean([m.paper.get(name) for m in self.mixtures])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for details."""
        return {
            "mixtures": [m.to_dict() for m in self.mixtures],
            "gain": self.gain,
            "interval": [self.interval.low, self.interval.high],
            "share": self.share,
            "share_interval": [self.share_interval.low, self.share_interval.high],
            "valid_nll": self.valid_nll,
        }


class Yardstick:
    """The base LM and the exact kNN-LM (att, squared L2), against which replacements are held."""

    def __init__(self, lab: Lab) -> None:
        self.resamples = lab.preset.resamples
        self.valid, self.test = lab.splits()
        self.setting = Setting()
        self.base_log_p = self.test.log_p_lm.double()
        component = lab.component(self.setting)
        log_p, mixture = self._mix(component, DEFAULT_TEMPERATURES)
        self._knn_log_p, self._knn_paper = log_p, mixture.paper
        self.temperature = mixture.temperature
        self.knn = self._replacement([mixture], log_p, self._valid_nll(component, mixture))

    @property
    def base(self) -> float:
        """Perplexity of the LM alone, per token on test."""
        return math.exp(-float(self.base_log_p.mean()))

    def measure(self, components: Sequence[LogP], lmbda: float | None = None) -> Replacement:
        """A replacement from its components, one a seed.

        `lmbda`: None fits each component's weight on valid; 1 takes the component alone.
        """
        mixed = [self._mix(one, (1.0,), lmbda) for one in components]
        log_p = torch.stack([log_p for log_p, _ in mixed]).mean(0)
        pairs = zip(components, mixed, strict=True)
        losses = [self._valid_nll(one, mixture) for one, (_, mixture) in pairs]
        return self._replacement([m for _, m in mixed], log_p, sum(losses) / len(losses))

    def difference(self, better: Replacement, worse: Replacement) -> Interval:
        """Of mean log p, `better` minus `worse`, over the same draws of documents."""
        return difference(self.test, better.log_p, worse.log_p, self.resamples)

    def _mix(
        self, component: LogP, temperatures: Sequence[float], lmbda: float | None = None
    ) -> tuple[Tensor, Mixture]:
        if lmbda is None:
            mixture = mix(self.valid, self.test, component, temperatures, resamples=self.resamples)
        else:
            mixture = report(
                self.test, component(self.test.name, 1.0), lmbda, resamples=self.resamples
            )
            paper = paper_way(self.test, component)
            alone = lmbda == 1
            mixture.paper.update({**paper, "mixture": paper["alone"] if alone else None})
        other = component(self.test.name, mixture.temperature).double()
        return mix_log_probs(self.base_log_p, other, mixture.lmbda), mixture

    def _valid_nll(self, component: LogP, mixture: Mixture) -> float:
        log_p = component(self.valid.name, mixture.temperature).double()
        return -float(mix_log_probs(self.valid.log_p_lm.double(), log_p, mixture.lmbda).mean())

    def _replacement(self, mixtures: list[Mixture], log_p: Tensor, valid_nll: float) -> Replacement:
        gain = float((log_p - self.base_log_p).mean())
        knn_gain = float((self._knn_log_p - self.base_log_p).mean())
        return Replacement(
            mixtures=mixtures,
            log_p=log_p,
            gain=gain,
            interval=difference(self.test, log_p, self.base_log_p, self.resamples),
            share=gain / knn_gain if knn_gain else math.nan,
            share_interval=self._share_interval(log_p),
            paper_share=self._paper_share(mixtures),
            valid_nll=valid_nll,
        )

    def _share_interval(self, log_p: Tensor) -> Interval:
        systems = {"base": self.base_log_p, "knn": self._knn_log_p, "this": log_p}
        samples = bootstrap_nll(self.test.document_ids, systems, resamples=self.resamples, seed=0)
        if set(samples) != set(systems):
            return percentile_interval(np.empty(0))
        gain, knn_gain = (samples["base"] - samples[name] for name in ("this", "knn"))
        with np.errstate(divide="ignore", invalid="ignore"):
            return percentile_interval(gain / knn_gain)

    def _paper_share(self, mixtures: Sequence[Mixture]) -> float:
        base, knn = self._knn_paper["base"], self._knn_paper["mixture"]
        mixed = _mean([m.paper.get("mixture") for m in mixtures])
        if base is None or mixed is None or base == knn:
            return math.nan
        return float((base - mixed) / (base - knn))


def convergence(runs: Sequence[Trained]) -> dict[str, Any]:
    """How the training went: losses by step for each seed, and whether valid had settled."""
    return {
        "history": [run.history for run in runs],
        "converged": all(run.converged for run in runs),
        "seconds": [run.seconds for run in runs],
    }


def still_falling(trainings: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence on what had not settled, from `convergence` by name; empty where all had."""
    names = [name for name, one in trainings.items() if not one["converged"]]
    if not names:
        return ""
    which = ", ".join(names) if len(names) <= 3 else f"{len(names)} of {len(trainings)} trainings"
    return f" Not settled (the valid loss fell by 0.02 nats or more in the second half): {which}."


def settled(agreement: Agreement, trainings: Mapping[str, Mapping[str, Any]]) -> Agreement:
    """The verdict, where what it rests on had settled; else `"agrees"` becomes `"agrees in part"`.

    That something trained stays behind the datastore also comes true by stopping early.
    """
    short = not all(one["converged"] for one in trainings.values())
    return "agrees in part" if agreement == "agrees" and short else agreement


def share_text(share: float, interval: Interval) -> str:
    """A share with its interval: `55 % [48, 61]`."""
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return f"{100 * share:.0f} %"
    return f"{100 * share:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
