"""Can a few centroids stand for the datastore's many rows?

About two rows a word, in place of hundreds: k-means over all keys, plain and spherical, with three
ways to count a cluster's words, and means of each word's keys, by both products, as they come and
trained further.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knnext.experiments.lab import Lab, centroid_sets, figures
from knnext.experiments.lab.centroid_sets import CentroidSet, centroid_set, components
from knnext.experiments.lab.contrast import Fitted, Gain, advantage, fit_component
from knnext.experiments.lab.examples import Examples
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.mixture import DEFAULT_TEMPERATURES, seed_interval
from knnext.experiments.lab.results import Agreement, Description, Findings, PaperFigure
from knnext.experiments.lab.soft_rows import TrainedRows, floored_nll
from knnext.experiments.lab.training import Schedule, trained

DESCRIPTION = Description(
    name="clustering",
    title="Clustering the datastore",
    question="How much of the datastore's gain do about 2 V centroids of its keys keep?",
    claim="Little: neither raw nor fine-tuned centroids come near the datastore.",
    varies="W_ds: centroids in place of keys; M: soft, by three weights; the product",
    paper=(
        PaperFigure("raw k-means centroids: 21.755 -> 21.309 at lmbda 0.040", "code"),
        PaperFigure("fine-tuned centroids: 21.109 at lmbda 0.101", "code"),
        PaperFigure("the datastore: 19.175 at lmbda 0.263", "code"),
    ),
)

METRICS = ("l2", "ip")
_DATASTORE, _TUNED = "datastore", "fine-tuned"
_TEMPERATURES = tuple(2.0**power for power in range(-1, 7))
_KNN_TEMPERATURES = DEFAULT_TEMPERATURES[6:28:2]
_STEP_FACTOR, _RATE, _BATCH = 0.5, 1e-2, 512
_SHARE = 0.5  # of the datastore's gain, above which centroids do come near


@dataclass(frozen=True)
class Trial:
    """One second component, fitted once for each seed."""

    rows: str
    state: str
    words: str
    metric: str
    num_rows: int
    fits: list[Fitted]

    @property
    def name(self) -> str:
        """For people."""
        words = "" if self.words == "one-hot" else f", by {self.words}"
        return f"{self.rows}{words} ({self.metric}, {self.state})"

    @property
    def valid_nll(self) -> float:
        """Mean over seeds of the loss on valid."""
        return seed_interval([f.valid_nll for f in self.fits])["mean"]

    @property
    def log_p(self) -> Tensor:
        """(n,) log p of the mixture on test, mean over seeds."""
        return torch.stack([f.log_p for f in self.fits]).mean(0)

    @property
    def setting(self) -> Setting:
        """The member of the family."""
        if self.rows == _DATASTORE:
            return Setting(metric=self.metric)
        m = "one-hot" if self.words == "one-hot" else "soft"
        return Setting("centroids", metric=self.metric, mask="none", m=m)


def run(lab: Lab) -> Findings:
    """Every set of centroids by both products, the fine-tuned ones, and the datastore."""
    seeds = lab.preset.seeds
    trials, over_all = [], [centroid_set(lab, centroid_sets.KMEANS, seed) for seed in seeds]
    trials += _raw(lab, over_all, METRICS)
    trials += _raw(lab, [centroid_set(lab, centroid_sets.SPHERICAL, seeds[0])], ("ip",))
    for name in centroid_sets.BY_WORD:
        trials += _raw(lab, [centroid_set(lab, name, seeds[0])], METRICS)
    trials.append(_tune(lab, over_all, trials))
    valid, test = lab.splits()
    resamples = lab.preset.resamples
    component = lab.component(Setting())
    knn = fit_component(valid, test, component, _KNN_TEMPERATURES, resamples=resamples)
    whole = Trial(_DATASTORE, "raw", "one-hot", "l2", len(lab.store("att")), [knn])
    return findings(lab, trials, whole)


def _raw(lab: Lab, sets: Sequence[CentroidSet], metrics: Sequence[str]) -> list[Trial]:
    """Trials of sets that differ in their seed alone: one for each metric and M."""
    valid, test = lab.splits()
    trials = []
    for metric in metrics:
        found = [components(lab, one, metric, _TEMPERATURES) for one in sets]
        for words in found[0]:
            fits = [
                fit_component(
                    valid, test, one[words], _TEMPERATURES, resamples=lab.preset.resamples
                )
                for one in found
            ]
            trials.append(Trial(sets[0].name, "raw", words, metric, len(sets[0].rows), fits))
    return trials


def _tune(lab: Lab, sets: Sequence[CentroidSet], trials: Sequence[Trial]) -> Trial:
    """The k-means centroids trained further, from the product and M that did best on valid."""
    raw = [trial for trial in trials if trial.rows == centroid_sets.KMEANS]
    best = min(raw, key=lambda trial: trial.valid_nll)
    option = lab.preset.option
    schedule = Schedule(
        steps=max(1, round(lab.preset.steps * option("clustering.steps", _STEP_FACTOR))),
        batch_size=_BATCH,
        learning_rate=option("clustering.learning_rate", _RATE),
    )
    valid, test = lab.splits()
    fits = []
    for one, fitted in zip(sets, best.fits, strict=True):
        temperature = fitted.mixture.temperature
        settings = {
            "centroids": one.settings,
            "words": best.words,
            "metric": best.metric,
            "temperature": temperature,
        }
        run = trained(
            lab,
            "centroids",
            settings,
            _builder(one, best, temperature),
            lambda split: _examples(lab, split),
            schedule,
            seed=one.seed,
            loss=floored_nll,
        )
        resamples = lab.preset.resamples
        fits.append(fit_component(valid, test, run.component, (1.0,), resamples=resamples))
    return Trial(best.rows, _TUNED, best.words, best.metric, best.num_rows, fits)


def _builder(one: CentroidSet, best: Trial, temperature: float) -> Any:
    return lambda _generator: TrainedRows(one.rows, one.words[best.words], best.metric, temperature)


def _examples(lab: Lab, split: str) -> Examples:
    states = lab.train_states("att") if split == "train" else lab.states(split, "att")
    return Examples((states.keys,), states.targets)


def findings(lab: Lab, trials: Sequence[Trial], whole: Trial) -> Findings:
    """The table, and how far the best centroids come."""
    _, test = lab.splits()
    resamples = lab.preset.resamples
    gains = [advantage(test, t.log_p, test.log_p_lm, resamples) for t in (*trials, whole)]
    rows = [_row(t, gain) for t, gain in zip((*trials, whole), gains, strict=True)]
    raw = [t for t in trials if t.state == "raw"]
    best = min(trials, key=lambda t: t.valid_nll)
    best_raw = min(raw, key=lambda t: t.valid_nll)
    gain, raw_gain = (gains[trials.index(t)] for t in (best, best_raw))
    lead = advantage(test, whole.log_p, best.log_p, resamples)
    share = gain.value / gains[-1].value if gains[-1].value > 0 else float("nan")
    words = (
        f"The best raw centroids, {best_raw.name}, change perplexity by {raw_gain}, the best of "
        f"all, {best.name}, by {gain}; the datastore of {whole.num_rows:,} rows by {gains[-1]}. "
        f"They keep {100 * share:.0f} % of its gain, with one row for "
        f"{whole.num_rows / best.num_rows:.0f} of its own (about 1,700 in the paper's setting)."
    )
    series = {
        "names": [t.name for t in (*trials, whole)],
        "gains": [g.to_dict() for g in gains],
    }
    details = {
        "settings": {t.name: t.setting.to_dict() for t in (*trials, whole)},
        "share of the datastore's gain": share,
        "lead of the datastore": lead.to_dict(),
        "fine-tuning": "M was counted on the rows that it trains on, so the loss on them is far "
        "below valid's from the start",
        "seeds": f"{len(lab.preset.seeds)} for k-means and its fine-tuning, one for the others",
    }
    return Findings(rows, agreement(lead, share), words, str(gain), series, details)


def _row(trial: Trial, gain: Gain) -> dict[str, Any]:
    mixtures = [f.mixture for f in trial.fits]
    mixed = seed_interval([m.mixture for m in mixtures])
    alone = [m.alone for m in mixtures if m.alone is not None]
    at_one = [
        perplexity
        for fitted in trial.fits
        for temperature, perplexity in fitted.curve.items()
        if trial.state != _TUNED and math.isclose(temperature, 1)
    ]
    return {
        "rows from": trial.rows,
        "state": trial.state,
        "M": trial.words,
        "product": trial.metric,
        "rows": trial.num_rows,
        "runs": len(trial.fits),
        "t": seed_interval([m.temperature for m in mixtures])["mean"],
        "lmbda": seed_interval([m.lmbda for m in mixtures])["mean"],
        "alone": seed_interval(alone)["mean"] if len(alone) == len(mixtures) else None,
        "at t = 1": seed_interval(at_one)["mean"] if at_one else None,
        "perplexity": mixed["mean"],
        "std over seeds": mixed["std"] if len(mixtures) > 1 else None,
        "change": str(gain),
        "paper's way": seed_interval([m.paper["mixture"] for m in mixtures])["mean"],
    }


def agreement(lead: Gain, share: float) -> Agreement:
    """The datastore leads and centroids keep under half of its gain: agrees. It leads: in part."""
    if lead.interval.low > 0:
        return "agrees" if share < _SHARE else "agrees in part"
    return "disagrees" if lead.interval.high < 0 else "undecided"


def plot(result: dict[str, Any], axes: Any) -> None:
    """The change of perplexity by each set of rows."""
    s = result["series"]
    axes.figure.set_size_inches(8.6, 1.4 + 0.27 * len(s["names"]))

    def change(gain: float | None) -> float | None:
        return None if gain is None else figures.percent_change(gain)

    names = [_in_words(name) for name in s["names"]]
    figures.bars(
        axes,
        names,
        [change(g["value"]) for g in s["gains"]],
        [(change(g["low"]), change(g["high"])) for g in s["gains"]],
        standard=next((n for n in names if n.startswith("datastore")), None),
    )
    axes.tick_params(axis="y", labelsize=8)
    figures.dress(
        axes,
        title="Centroids in place of the datastore",
        xlabel=figures.CHANGE_LABEL,
        ylabel="",
    )


def _in_words(name: str) -> str:
    """`k-means (l2, raw)` as it is said: the metric in words, what is fine-tuned named."""
    head, _, tail = name.rpartition(" (")
    metric, _, state = tail.rstrip(")").partition(", ")
    tuned = "" if state == "raw" else f", {state}"
    return f"{head}, {figures.METRICS[metric]}{tuned}" if metric in figures.METRICS else name
