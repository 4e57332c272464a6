"""Perplexity against the size of the datastore: does more of it keep helping?

Nested random samples of the rows, the same for everyone: each is part of the next. Every size has
its own index, trained on its own rows by the same recipe with the same nprobe, its own searches,
and its own temperature and lmbda. The k nearest of a small sample are a larger share of it and
lie farther away, so a temperature fitted at one size does not serve another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from knnext.experiments.lab import EVALUATED, Lab
from knnext.experiments.lab.claims import holds, together
from knnext.experiments.lab.contrast import Fitted, Gain, advantage, fit_component
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.growth import per_doubling, r_squared
from knnext.experiments.lab.mixture import DEFAULT_TEMPERATURES, LogP, Split
from knnext.experiments.lab.results import (
    Agreement,
    Description,
    Findings,
    PaperFigure,
    percent,
    percent_interval,
)
from knnext.experiments.lab.sweep import refine

DESCRIPTION = Description(
    name="datastore-size",
    title="Size of the datastore",
    question="Does perplexity keep falling as the datastore grows?",
    claim="It falls almost linearly with the size and does not saturate at 90 %; 5 % of the rows "
    "beat the LM already. Approximate search or not makes no difference to this.",
    varies="the share of the rows (5 % to 100 %, nested); mask and score (exact or FAISS)",
    paper=(
        PaperFigure("nearly a straight line from 5 % to 100 %, no saturation at 90 %", "digest"),
        PaperFigure("5 % of the datastore still beats the LM", "digest"),
        PaperFigure("26.4 % of the rows of each of its samples are zeros", "code"),
    ),
)

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SEARCHES = (("exact", "real"), ("faiss", "real"), ("faiss", "faiss"))
STRAIGHT = 0.95  # R^2 from which a curve counts as almost a line


@dataclass(frozen=True)
class Point:
    """One size under one search. `neighbors`: found for a test target, k where none is missing."""

    fraction: float
    entries: int
    neighbors: float
    fitted: Fitted


@dataclass(frozen=True)
class Curve:
    """The sizes of one search.

    Attributes:
        points: by size.
        smallest: gain of the smallest size over the LM.
        steps: gain of each size over the one before.
        straight: R^2 of perplexity as a straight line in the size and in its logarithm, and of
            perplexity at t = 1 as a line in the size.
        doubling: gain of twice the rows, slope of the line in the logarithm of the size.
    """

    points: list[Point]
    smallest: Gain
    steps: list[Gain]
    straight: dict[str, float]
    doubling: Gain


def run(lab: Lab) -> Findings:
    """Fit every size under every search."""
    fractions = sorted(lab.preset.option("datastore-size.fractions", FRACTIONS))
    if len(fractions) < 2:
        raise ValueError(f"datastore-size.fractions must name two sizes or more, got {fractions}")
    test = lab.split("test")
    curves = {
        (mask, score): curve(
            [measure(lab, Setting(mask=mask, score=score, fraction=f)) for f in fractions],
            test,
            lab.preset.resamples,
        )
        for mask, score in SEARCHES
    }
    return conclude(curves, test)


def measure(lab: Lab, setting: Setting) -> Point:
    """One size under one search, temperature and lmbda fitted for it."""
    grid = sorted({1.0, *lab.preset.option("datastore-size.temperatures", DEFAULT_TEMPERATURES)})
    found = {name: lab.neighbors(setting, name) for name in EVALUATED}
    log_p: LogP = cache(lambda name, temperature: found[name].log_p_knn(temperature))
    valid, test = lab.splits()
    fitted = fit_component(
        valid, test, log_p, refine(valid, log_p, grid), resamples=lab.preset.resamples
    )
    entries = lab.store(setting.h_ds, fraction=setting.fraction).num_entries
    neighbors = float((found["test"].tokens >= 0).double().sum(1).mean())
    return Point(setting.fraction, entries, neighbors, fitted)


def curve(points: Sequence[Point], test: Split, resamples: int = 1000) -> Curve:
    """What the sizes of one search say together."""
    log_ps = [p.fitted.log_p for p in points]
    sizes = [p.entries for p in points]
    smallest = advantage(test, log_ps[0], test.log_p_lm, resamples)
    steps = [advantage(test, b, a, resamples) for a, b in pairwise(log_ps)]
    perplexities = [p.fitted.mixture.mixture for p in points]
    straight = {
        "size": r_squared(sizes, perplexities),
        "log size": r_squared(np.log2(sizes), perplexities),
        "size, at t = 1": r_squared(sizes, [p.fitted.curve[1.0] for p in points]),
    }
    return Curve(
        list(points), smallest, steps, straight, per_doubling(test, sizes, log_ps, resamples)
    )


def conclude(curves: Mapping[tuple[str, str], Curve], test: Split) -> Findings:
    """Four parts, each for all three searches: the smallest size beats the LM (interval above 0);
    the last step of size still gains (interval above 0); perplexity is a line in the size, R^2 at
    least 0.95, at t = 1 (the paper's) and with t fitted."""
    parts: dict[str, Agreement] = {
        "the smallest beats the LM": together(
            *(holds(c.smallest.interval) for c in curves.values())
        ),
        "no saturation": together(*(holds(c.steps[-1].interval) for c in curves.values())),
        "almost linear at t = 1": _lines(curves, "size, at t = 1"),
        "almost linear with t fitted": _lines(curves, "size"),
    }
    exact, faiss = curves["exact", "real"], curves["faiss", "faiss"]
    low, last = exact.points[0], exact.points[-2]
    words = (
        f"{low.fraction:.0%} of the rows change perplexity by {exact.smallest} (true neighbors, "
        f"real scores; FAISS's own: {faiss.smallest}), all of them by {_full(exact)} "
        f"({_full(faiss)}). From {last.fraction:.0%} to 100 % there is a further {exact.steps[-1]} "
        f"({faiss.steps[-1]}). Each doubling brings {exact.doubling} ({faiss.doubling}). R² of a "
        f"line in the size: {exact.straight['size']:.3f}, in its logarithm "
        f"{exact.straight['log size']:.3f}; at t = 1, in the size: "
        f"{exact.straight['size, at t = 1']:.3f}."
    )
    return Findings(
        rows=[row(*which, p, c, test) for which, c in curves.items() for p in c.points],
        agreement=together(*parts.values()),
        words=words,
        headline=f"{exact.doubling} for each doubling; last step {exact.steps[-1]}",
        series={
            "base": exact.points[0].fitted.mixture.base,
            "curves": [_series(*which, c) for which, c in curves.items()],
        },
        details={
            "parts": parts,
            "searches": [
                {
                    "mask": mask,
                    "score": score,
                    "R² of a line in": c.straight,
                    "doubling": c.doubling.to_dict(),
                    "steps": [s.to_dict() for s in c.steps],
                }
                for (mask, score), c in curves.items()
            ],
        },
    )


def _lines(curves: Mapping[tuple[str, str], Curve], which: str) -> Agreement:
    straight = [c.straight[which] >= STRAIGHT for c in curves.values()]
    return together(*("agrees" if s else "disagrees" for s in straight))


def row(mask: str, score: str, point: Point, whole: Curve, test: Split) -> dict[str, Any]:
    """The table's line of one size."""
    f, paper = point.fitted.mixture, point.fitted.mixture.paper
    full = whole.points[-1].fitted.mixture.gain
    place = whole.points.index(point)
    before = whole.points[place - 1] if place else None
    step = whole.steps[place - 1] if before else None
    doublings = math.log2(point.entries / before.entries) if before else 1.0
    return {
        "mask": mask,
        "score": score,
        "fraction": point.fraction,
        "entries": point.entries,
        "neighbors found": point.neighbors,
        "t": f.temperature,
        "lmbda": f.lmbda,
        "mixture": f.mixture,
        "oracle": f.oracle,
        "change": percent_interval(f.gain, f.interval.low, f.interval.high),
        "share of the whole gain": f.gain / full if full else None,
        "against the size before": str(step) if step else None,
        "per doubling there": percent(step.value / doublings) if step else None,
        "mixture at t = 1": point.fitted.curve[1.0],
        "paper's way: t": paper["temperature"],
        "paper's way: lmbda": paper["lmbda"],
        f"paper's way: mixture per {paper['per']}": paper["mixture"],
    }


def _full(curve: Curve) -> str:
    f = curve.points[-1].fitted.mixture
    return percent_interval(f.gain, f.interval.low, f.interval.high)


def _series(mask: str, score: str, curve: Curve) -> dict[str, Any]:
    return {
        "mask": mask,
        "score": score,
        "entries": [p.entries for p in curve.points],
        "perplexity": [p.fitted.mixture.mixture for p in curve.points],
        "at t = 1": [p.fitted.curve[1.0] for p in curve.points],
    }


def plot(result: dict[str, Any], axes: Any) -> None:
    """Perplexity against the number of rows, a line for each search."""
    from knnext.experiments.lab.figures import (
        dress,
        legend_below,
        line,
        look,
        note,
        plain_ticks,
        reference_line,
        searched,
    )

    reference_line(axes, result["series"]["base"], "the LM alone")
    for one in result["series"]["curves"]:
        way = (one["mask"], one["score"])
        label, style = searched(*way), look(*way)
        if way == ("exact", "real"):
            dots = {**style, "linestyle": ":", "markerfacecolor": "white"}
            line(axes, one["entries"], one["at t = 1"], f"{label}, t = 1", **dots)
            # What lies on it stays visible: broad and pale below, thin above.
            style |= {"linewidth": 5.0, "alpha": 0.4}
        line(axes, one["entries"], one["perplexity"], label, **style)
    plain_ticks(axes.xaxis)
    dress(
        axes,
        title="Perplexity by the size of the datastore",
        xlabel="rows of the datastore",
        ylabel="perplexity per token (test)",
        legend=False,
    )
    legend_below(axes)
    note(
        axes.figure,
        "Temperature and λ are fitted at each size, but where t = 1. "
        f"In figures: {result['headline'].replace('-', '−')}.",
    )
