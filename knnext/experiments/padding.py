"""The finding that approximate search beats exact search, tested against an artefact of its data.

The published datastore was allocated larger than its text: 26.4 % of its rows were never written.
They are keys of zeros with the value `<s>`, which is never a target, and exact search meets them
wherever |q|^2 is below the k-th distance. Here the comparison is made with such rows and without.

What the rows explain is a difference in differences: the advantage of approximate over exact
search with the rows, minus that without them, over the same tokens and draws of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor

from knnext.experiments.lab import EVALUATED, Lab
from knnext.experiments.lab.claims import holds, together
from knnext.experiments.lab.contrast import (
    Fitted,
    Gain,
    advantage,
    difference_in_differences,
    fit_component,
)
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.mixture import DEFAULT_TEMPERATURES, Split
from knnext.experiments.lab.padding_geometry import depth_curves, moved_origins
from knnext.experiments.lab.padding_plot import plot
from knnext.experiments.lab.results import Description, Findings, PaperFigure
from knnext.experiments.lab.zero_rows import places_taken, probability_taken

__all__ = ["DESCRIPTION", "plot", "run"]

DESCRIPTION = Description(
    name="padding",
    title="Zero rows in the datastore",
    question="How much of 'approximate search beats exact search' is due to the 26.4 % of zero "
    "rows in the published datastore?",
    claim="Approximate search beats exact search, more so in a small datastore; the paper reads "
    "this as regularisation.",
    varies="padding (0 and 26.4 % of all rows), fraction, mask and score, t, nprobe; the origin "
    "that the keys are measured from",
    paper=(
        PaperFigure(
            "40,492,301 of 153,225,485 rows (26.4 %) are zeros, in every subsample too", "code"
        ),
        PaperFigure("FAISS mask beats exact search; the 5 % datastore gains more", "digest"),
        PaperFigure("best t, 100 %: 1.6 exact; 0.9 FAISS score, 2.0 real score", "code"),
        PaperFigure("|q|^2 roughly 28 to 36, so |q|^2 / t = 18 to 23 for exact search", "recalled"),
    ),
)

EXACT, FAISS = ("exact", "real"), ("faiss", "faiss")
SEARCHES = (EXACT, FAISS, ("faiss", "real"))
FRACTIONS, SHARE, NPROBES = (0.05, 1.0), 0.264, (8, 128)


@dataclass(frozen=True)
class Arm:
    """One search of one datastore, fitted, with what zero rows took of it on test.

    Attributes:
        nprobe: lists visited; 0 for exact search.
        places: (n,) zero rows among the neighbors of each target.
        probability: mean p_knn of the zero rows' value at each temperature.
        square: median |q|^2 of the queries.
        ratio: (n,) |q|^2 as a multiple of the distance of the last neighbor kept.
        empty: share of places without a neighbor.
    """

    setting: Setting
    nprobe: int
    fitted: Fitted
    places: Tensor
    probability: dict[float, float]
    square: float
    ratio: Tensor
    empty: float


@dataclass(frozen=True)
class Contrast:
    """The advantage of one approximate search over exact search, with zero rows and without."""

    fraction: float
    score: str
    nprobe: int
    with_rows: Gain
    without: Gain
    explained: Gain

    @property
    def share(self) -> float | None:
        """Of the advantage with the rows, the part that they explain; None where no advantage is
        certain, and there is nothing to explain."""
        sure = self.with_rows.interval.low > 0
        return self.explained.value / self.with_rows.value if sure else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        gains = {name: getattr(self, name) for name in ("with_rows", "without", "explained")}
        plain = {"fraction": self.fraction, "score": self.score, "nprobe": self.nprobe}
        return {**plain, **{n: g.to_dict() for n, g in gains.items()}, "share": self.share}


def run(lab: Lab) -> Findings:
    """All searches of all datastores, their contrasts, and the geometry behind them."""
    fractions = tuple(_option(lab, "fractions", FRACTIONS))
    share = _option(lab, "share", SHARE)
    arms = [
        _arm(lab, Setting(mask=mask, score=score, fraction=f, padding=padding), nprobe)
        for f, padding, (mask, score) in product(fractions, (0.0, share), SEARCHES)
        for nprobe in _nprobes(lab, mask, score)
    ]
    contrasts = compare(arms, lab.split("test"), lab.preset.resamples)
    depths = depth_curves(lab, fractions)
    main = [c for c in contrasts if c.nprobe == lab.preset.nprobe]
    return Findings(
        rows=[_row(lab, arm, contrasts) for arm in arms],
        agreement=together(*(holds(c.without.interval) for c in main)),
        words=_words(lab, arms, main, depths["curves"][0]),
        headline="explained by the rows: "
        + "; ".join(
            f"{c.explained} at {100 * c.fraction:.3g} %" for c in main if c.score == "faiss"
        ),
        series={
            "curves": [_curve(a) for a in arms if a.nprobe in (0, lab.preset.nprobe)],
            "contrasts": [c.to_dict() for c in contrasts],
            "depths": depths,
            "origins": moved_origins(lab, fractions, share),
        },
        details={
            "settings": [a.setting.to_dict() for a in arms],
            "definition": "explained by the rows: advantage of approximate over exact search with "
            "the rows minus that without them, mean log-probability of test's targets",
        },
    )


def compare(arms: Sequence[Arm], test: Split, resamples: int) -> list[Contrast]:
    """One contrast for each approximate search, with the exact search of the same datastore."""
    by = {_key(a): a.fitted.log_p for a in arms}
    found = []
    for a in arms:
        if a.setting.mask == "exact" or a.setting.padding:
            continue
        fraction, search = a.setting.fraction, _key(a)[2:]
        without, with_rows = (
            (by[(fraction, rows, *search)], by[(fraction, rows, *EXACT, 0)])
            for rows in (False, True)
        )
        found.append(
            Contrast(
                fraction,
                a.setting.score,
                a.nprobe,
                advantage(test, *with_rows, resamples),
                advantage(test, *without, resamples),
                difference_in_differences(test, with_rows, without, resamples),
            )
        )
    return found


def _option(lab: Lab, name: str, default: Any) -> Any:
    return lab.preset.option(f"padding.{name}", default)


def _nprobes(lab: Lab, mask: str, score: str) -> list[int]:
    """Lists visited by the arms of one kind: approximation is varied with FAISS's own scores."""
    if mask == "exact":
        return [0]
    more = _option(lab, "nprobes", NPROBES) if (mask, score) == FAISS else ()
    return sorted({lab.preset.nprobe, *more})


def _key(arm: Arm) -> tuple[Any, ...]:
    s = arm.setting
    return (s.fraction, s.padding > 0, s.mask, s.score, arm.nprobe)


def _arm(lab: Lab, setting: Setting, nprobe: int) -> Arm:
    valid, test = lab.splits()
    grid = _option(lab, "temperatures", DEFAULT_TEMPERATURES)
    found = {name: lab.neighbors(setting, name, nprobe=nprobe or None) for name in EVALUATED}
    fitted = fit_component(
        valid, test, lambda n, t: found[n].log_p_knn(t), grid, resamples=lab.preset.resamples
    )
    scores, token = found["test"], lab.padding_token
    squares = lab.states("test").keys.to(lab.store().dtype).float().square().sum(1)
    last = scores.distances.masked_fill(scores.tokens < 0, 0).amax(1)
    return Arm(
        setting,
        nprobe,
        fitted,
        places_taken(scores, token),
        probability_taken(scores, token, grid),
        float(squares.median()),
        squares / last,
        float((scores.tokens < 0).double().mean()),
    )


def _row(lab: Lab, arm: Arm, contrasts: Sequence[Contrast]) -> dict[str, Any]:
    s, f = arm.setting, arm.fitted.mixture
    gain = next(
        (
            c.with_rows if s.padding else c.without
            for c in contrasts
            if (c.fraction, c.score, c.nprobe) == (s.fraction, s.score, arm.nprobe)
        ),
        None,
    )
    return {
        "fraction": s.fraction,
        "zero rows": s.padding,
        "mask": s.mask,
        "score": s.score,
        "nprobe": arm.nprobe or None,
        "t": f.temperature,
        "lmbda": f.lmbda,
        "perplexity": f.mixture,
        "change": str(Gain(f.gain, f.interval)),
        "against exact": None if gain is None else str(gain),
        "places of zero rows": float(arm.places.double().mean()) / lab.preset.k,
        "queries that meet one": float((arm.places > 0).double().mean()),
        "their probability at t": arm.probability[f.temperature],
        "median |q|^2 / last distance": float(arm.ratio.median()),
        "median |q|^2 / t": arm.square / f.temperature,
        "places left empty": arm.empty,
        "paper's way: t": f.paper["temperature"],
        "paper's way: lmbda": f.paper["lmbda"],
        f"paper's way: per {f.paper['per']}": f.paper["mixture"],
    }


def _curve(arm: Arm) -> dict[str, Any]:
    s = arm.setting
    return {
        "fraction": s.fraction,
        "padding": s.padding,
        "mask": s.mask,
        "score": s.score,
        "temperatures": list(arm.fitted.curve),
        "perplexity": list(arm.fitted.curve.values()),
        "probability": list(arm.probability.values()),
        "base": arm.fitted.mixture.base,
    }


def _words(lab: Lab, arms: Sequence[Arm], main: Sequence[Contrast], keys: dict[str, Any]) -> str:
    """The plain answer, for each size of the datastore, and for the paper's if keys lay as here."""
    exact = {_key(a)[:2]: a for a in arms if a.setting.mask == "exact"}
    found = []
    for fraction in sorted({c.fraction for c in main}):
        by = {c.score: c for c in main if c.fraction == fraction}
        found.append(_comparison(fraction, by["faiss"], by["real"]))
        found.append(_shares(exact[fraction, True], lab.preset.k))
    paper = " and ".join(f"{part:.1%} at its {name}" for name, part in keys["at paper"].items())
    found.append(
        f"At the paper's k / N, with keys that lie as these, zero rows would take {paper} of the "
        "places."
    )
    return " ".join(found)


def _comparison(fraction: float, faiss: Contrast, real: Contrast) -> str:
    share = (
        "no advantage is certain even with them, so there is none to explain"
        if faiss.share is None
        else f"{faiss.share:.0%} of the advantage"
    )
    return (
        f"At {100 * fraction:.3g} % of the datastore FAISS instead of exact search changes "
        f"perplexity by {faiss.with_rows} with the zero rows and by {faiss.without} without; the "
        f"rows explain a change of {faiss.explained} ({share}). With real scores: "
        f"{real.with_rows}, {real.without}, and {real.explained}."
    )


def _shares(exact: Arm, k: int) -> str:
    t, grid = exact.fitted.mixture.temperature, list(exact.probability)
    hotter = min(grid, key=lambda other: abs(other - 3 * t))
    return (
        f"Exact search keeps zero rows in its top {k} for "
        f"{float((exact.places > 0).double().mean()):.0%} of the queries. They take "
        f"{float(exact.places.double().mean()) / k:.1%} of all places, but "
        f"{exact.probability[t]:.2%} of the probability at the fitted t = {t:.3g}, where "
        f"|q|^2 / t = {exact.square / t:.0f}, and {exact.probability[hotter]:.2%} at t = "
        f"{hotter:.3g}."
    )
