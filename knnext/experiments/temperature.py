"""The temperature of p_knn under the four pairs of mask and score, small datastore and whole.

Each pair is searched once, and all temperatures are applied to what was found. lmbda is fitted
anew at every temperature; once more it is held, which changes the order of the pairs.

Temperatures are on the scale of squared distances, so those of two models do not compare: what
compares is the order of the best temperatures of the pairs, and whether 1 is among them. The
paper's grid is 0.1 to 3.0 by 0.1; a wider one goes on past it, and a row says where the best lies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from knnext.evaluation.tune import PAPER_TEMPERATURES
from knnext.experiments.lab import Lab
from knnext.experiments.lab.claims import holds, negligible, together
from knnext.experiments.lab.contrast import Gain, advantage, difference_in_differences
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.mixture import LogP
from knnext.experiments.lab.results import Agreement, Description, Findings, PaperFigure
from knnext.experiments.lab.sweep import Sweep, orders_differ, refine, sweep

DESCRIPTION = Description(
    name="temperature",
    title="Temperature",
    question="Is t = 1 best, and does that depend on how neighbors are found and scored?",
    claim="t = 1 is not optimal; FAISS's mask beats exact search, and more so at 5 % of the "
    "datastore; FAISS's scores instead of real ones change little.",
    varies="t (0.1 to 3.0 by 0.1, and past it), mask and score (exact or FAISS), 5 % or all rows",
    paper=(
        PaperFigure(
            "best t of the whole store: 1.6 (exact mask, real score), 0.9 (FAISS, FAISS), 2.0 "
            "(FAISS mask, real score); inferred from the files picked, on the scale of its keys",
            "code",
        ),
        PaperFigure("exact mask with FAISS score was never run", "code"),
        PaperFigure("FAISS mask beats exact search, more so at 5 %", "digest"),
        PaperFigure("its exact search met 26.4 % zero rows (see padding)", "code"),
    ),
)

FRACTIONS = (0.05, 1.0)
PAIRS = (("exact", "real"), ("faiss", "faiss"), ("faiss", "real"), ("exact", "faiss"))
#: Read from the published code, of the whole store. Their order is what compares.
PAPER_BEST = {("exact", "real"): 1.6, ("faiss", "faiss"): 0.9, ("faiss", "real"): 2.0}
LOW, HIGH = 0.1, 3.0  # the paper's grid
#: Goes on where the paper's ends; keys of norm 30 want temperatures in the hundreds.
WIDE = tuple(np.geomspace(HIGH, 1000, 26)[1:].tolist())
OVERALL, SCORE = "FAISS over exact", "FAISS score over real, FAISS mask"

Sweeps = Mapping[tuple[float, str, str], Sweep]  # by fraction, mask, score


def run(lab: Lab) -> Findings:
    """Sweep every pair at every size."""
    fractions = sorted(lab.preset.option("temperature.fractions", FRACTIONS))
    sweeps = {
        (fraction, mask, score): sweep_pair(lab, Setting(mask=mask, score=score, fraction=fraction))
        for fraction in fractions
        for mask, score in PAIRS
    }
    return conclude(sweeps, lab.preset.resamples)


def sweep_pair(lab: Lab, setting: Setting) -> Sweep:
    """The paper's temperatures and wider ones; finer where the best lies past the paper's."""
    valid, test = lab.splits()
    log_p: LogP = cache(lab.component(setting))
    wide = [float(t) for t in lab.preset.option("temperature.wide", WIDE)]
    grid = [*PAPER_TEMPERATURES.tolist(), *wide]
    finer = [t for t in refine(valid, log_p, grid) if t > HIGH]
    return sweep(valid, test, log_p, [*grid, *finer])


def conclude(sweeps: Sweeps, resamples: int) -> Findings:
    """Four parts, each by intervals of test: the best t beats t = 1 for every pair; FAISS's mask
    and score beat exact search at every size; they differ from its mask with real scores by less
    than 1 %; and at the smallest size there is an advantage over exact search, a larger one. (To
    harm less there would not do.)"""
    ones = {which: tuned(s, resamples) for which, s in sweeps.items()}
    gains = comparisons(sweeps, resamples)
    growth = smaller_helps(sweeps, resamples)
    parts: dict[str, Agreement] = {
        "t = 1 is not optimal": together(*(holds(g.interval) for g in ones.values())),
        "FAISS mask beats exact": together(*(holds(g.interval) for g in gains[OVERALL].values())),
        "whose score matters little": together(
            *(negligible(g.interval) for g in gains[SCORE].values())
        ),
    }
    if growth is not None:
        smallest = holds(gains[OVERALL][min(gains[OVERALL])].interval)
        parts["more so at the smallest size"] = (
            holds(growth.interval) if smallest == "agrees" else smallest
        )
    whole = max(fraction for fraction, _, _ in sweeps)
    full = {(mask, score): sweeps[whole, mask, score] for mask, score in PAIRS}
    rising = sorted(PAPER_BEST, key=PAPER_BEST.__getitem__)
    order = [full[pair].temperatures[full[pair].best] for pair in rising]
    verdict = "does not hold" if order != sorted(order) else "holds"
    if verdict == "holds" and len(set(order)) < len(order):
        verdict = "holds but for ties"
    differing, of = orders_differ(list(full.values()), LOW, HIGH)
    best = ", ".join(
        f"{s.temperatures[s.best]:.3g} ({_name(*pair)}; paper {PAPER_BEST.get(pair, 'none')})"
        for pair, s in full.items()
    )
    exact, faiss = ones[whole, "exact", "real"], ones[whole, "faiss", "faiss"]
    sizes = ", ".join(f"{gain} at {fraction:.0%}" for fraction, gain in gains[OVERALL].items())
    words = (
        f"Best t with all rows: {best}; the paper's order of the three {verdict}. It changes "
        f"perplexity against t = 1 by {exact} (exact) and {faiss} (FAISS); FAISS's mask and score "
        f"instead of exact search {sizes}. With lmbda held at its value for t = 1, the four pairs "
        f"stand in another order at {differing} of the paper's {of} temperatures."
    )
    return Findings(
        rows=[row(*which, s, ones[which]) for which, s in sweeps.items()],
        agreement=together(*parts.values()),
        words=words,
        headline=f"best t instead of 1: {exact}; FAISS instead of exact: {gains[OVERALL][whole]}",
        series={
            "base": math.exp(-float(full["exact", "real"].test.log_p_lm.mean())),
            "curves": [_series(*which, s) for which, s in sweeps.items()],
        },
        details={
            "parts": parts,
            "comparisons": [
                {"what": name, "fraction": fraction, **gain.to_dict()}
                for name, by_size in gains.items()
                for fraction, gain in by_size.items()
            ],
            "smaller helps": growth.to_dict() if growth else None,
            "orders differ": {"temperatures": differing, "of": of},
            "order of best t": {
                "here": _order({pair: s.temperatures[s.best] for pair, s in full.items()}),
                "paper": _order(PAPER_BEST),
            },
        },
    )


def tuned(one: Sweep, resamples: int = 1000) -> Gain:
    """Advantage of the fitted temperature over t = 1, lmbda fitted for both."""
    return advantage(one.test, one.mixed(one.best), one.mixed(one.one), resamples)


def comparisons(sweeps: Sweeps, resamples: int = 1000) -> dict[str, dict[float, Gain]]:
    """Paired advantages by size, each pair at its own best temperature."""
    wanted = {
        OVERALL: (("faiss", "faiss"), ("exact", "real")),
        "FAISS mask over exact mask, real scores": (("faiss", "real"), ("exact", "real")),
        SCORE: (("faiss", "faiss"), ("faiss", "real")),
        "FAISS score over real, exact mask": (("exact", "faiss"), ("exact", "real")),
    }
    gains: dict[str, dict[float, Gain]] = {name: {} for name in wanted}
    for fraction in sorted({fraction for fraction, _, _ in sweeps}):
        for name, pairs in wanted.items():
            better, worse = (sweeps[fraction, mask, score] for mask, score in pairs)
            gains[name][fraction] = advantage(
                better.test, better.mixed(better.best), worse.mixed(worse.best), resamples
            )
    return gains


def smaller_helps(sweeps: Sweeps, resamples: int = 1000) -> Gain | None:
    """How much larger FAISS's advantage over exact search is at the smallest size than at the
    largest; None where there is one size."""
    fractions = sorted({fraction for fraction, _, _ in sweeps})
    if len(fractions) < 2:
        return None
    small, whole = (
        (faiss.mixed(faiss.best), exact.mixed(exact.best))
        for faiss, exact in (
            (sweeps[f, "faiss", "faiss"], sweeps[f, "exact", "real"])
            for f in (fractions[0], fractions[-1])
        )
    )
    test = sweeps[fractions[0], "exact", "real"].test
    return difference_in_differences(test, small, whole, resamples)


def row(fraction: float, mask: str, score: str, s: Sweep, gain: Gain) -> dict[str, Any]:
    """The table's line of one pair at one size."""
    inside = s.best_within(LOW, HIGH)
    paper = s.paper_best
    edges = (0, len(s.temperatures) - 1)
    return {
        "fraction": fraction,
        "mask": mask,
        "score": score,
        "best t": s.temperatures[s.best],
        "best t lies": "at an end of the grid"
        if s.best in edges
        else "in 0.1 to 3.0"
        if LOW <= s.temperatures[s.best] <= HIGH
        else "past 3.0",
        "best t in 0.1 to 3.0": s.temperatures[inside],
        "paper's best t (its scale)": PAPER_BEST.get((mask, score)) if fraction == 1 else None,
        "lmbda": s.lmbdas[s.best],
        "mixture": s.perplexity[s.best],
        "mixture at t = 1": s.perplexity[s.one],
        "best t against 1": str(gain),
        "lmbda held: best t": s.temperatures[s.held_best],
        "lmbda held: mixture": s.held[s.held_best],
        "paper's way: best t": None if paper is None else s.temperatures[paper],
        f"paper's way: mixture per {_per(s)}": None if paper is None else s.paper[paper],
        f"paper's way: mixture per {_per(s)} at t = 1": s.paper[s.one],
    }


def plot(result: dict[str, Any], axes: Any) -> None:
    """Perplexity against t, a panel for each size of the datastore.

    True and FAISS's neighbors often lie on one another: those are drawn broad and pale, these thin
    above them.
    """
    from knnext.experiments.lab import figures

    figure, curves = axes.figure, result["series"]["curves"]
    axes.remove()
    fractions = sorted({one["fraction"] for one in curves})
    figure.set_size_inches(5.4 * len(fractions) if len(fractions) > 1 else 7.2, 5.4)
    panels = figure.subplots(1, len(fractions), sharey=True, squeeze=False)[0]
    for panel, fraction in zip(panels, fractions, strict=True):
        for mask, score in sorted(PAIRS):
            for one in curves:
                if (one["fraction"], one["mask"], one["score"]) != (fraction, mask, score):
                    continue
                broad = mask == "exact"
                best = one["temperatures"].index(one["best"])
                panel.plot(
                    one["temperatures"],
                    one["perplexity"],
                    linewidth=6.0 if broad else 1.6,
                    alpha=0.35 if broad else 1.0,
                    solid_capstyle="butt",
                    markersize=9 if broad else 5,
                    markevery=[best],
                    label=figures.searched(mask, score),
                    **figures.look(mask, score),
                )
        base = result["series"]["base"]
        panel.axhline(base, color=figures.INK, linewidth=1.0, label="the LM alone")
        panel.axvline(1.0, color=figures.MUTED, linewidth=0.8, linestyle=":", label="t = 1")
        panel.set_xscale("log")
        figures.plain_ticks(panel.xaxis)
        figures.dress(
            panel,
            title=f"{100 * fraction:.3g} % of the datastore",
            xlabel="temperature t, log scale",
            ylabel="perplexity per token (test)" if panel is panels[0] else "",
            legend=False,
        )
    figures.legend_of_all(figure, panels[0])
    figures.note(
        figure,
        "λ is fitted at each t; marks: the best t on the validation split. "
        f"In figures: {result['headline'].replace('-', '−')}.",
    )


def _series(fraction: float, mask: str, score: str, s: Sweep) -> dict[str, Any]:
    curves = {"perplexity": s.perplexity, "lmbda": s.lmbdas, "held": s.held, "paper": s.paper}
    place = {"fraction": fraction, "mask": mask, "score": score}
    return {**place, "best": s.temperatures[s.best], "temperatures": s.temperatures, **curves}


def _name(mask: str, score: str) -> str:
    names = {"exact": "exact", "faiss": "FAISS", "real": "real"}
    return f"{names[mask]} mask, {names[score]} score"


def _order(best: Mapping[tuple[str, str], float]) -> list[str]:
    return [_name(*pair) for pair in sorted(best, key=best.__getitem__)]


def _per(s: Sweep) -> str:
    return "word" if s.test.counts.words else "token"
