"""From coarse to exact search: where on the way would approximate search beat exact search?

Two roads lead there. FAISS visits more of its lists until it visits all, and its codes grow until
they are the keys themselves. At each stop the same rows are scored twice, from the codes and from
the stored keys, with temperature and lmbda fitted for each. How far a stop is from exact search is
its recall; nprobe says little, as lists are shorter in a smaller datastore.

Two controls need no index: a part of the true neighbors, the nearest ones or some drawn by lot.
Where these do as well as a search of the same recall, it is the number of neighbors that counts
and not how FAISS errs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor

from knnext.evaluation.scores import StreamScores
from knnext.experiments.lab import EVALUATED, Lab
from knnext.experiments.lab.claims import holds, together
from knnext.experiments.lab.contrast import Fitted, Gain, advantage, fit_component
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.figures import (
    MUTED,
    dress,
    legend_of_all,
    look,
    note,
    percent_change,
    plain_ticks,
)
from knnext.experiments.lab.mixture import DEFAULT_TEMPERATURES
from knnext.experiments.lab.recall import recall, thin
from knnext.experiments.lab.results import Description, Findings, PaperFigure

DESCRIPTION = Description(
    name="approximation",
    title="From coarse to exact search",
    question="Where between coarse and exact does approximate search give a better mixture than "
    "exact search?",
    claim="FAISS's neighbors beat the true ones, whichever score they have; scores of FAISS "
    "instead of real ones change little.",
    varies="mask (nprobe, bytes of a code) and score, at two sizes of the datastore; for control "
    "the true neighbors thinned out",
    paper=(
        PaperFigure("FAISS mask beats exact search; the score matters little", "digest"),
        PaperFigure("4,096 lists, 32 visited, 64-byte codes of 1,024 dimensions", "code"),
    ),
)

FRACTIONS = (0.05, 1.0)
#: Lists visited with the preset's code, and code sizes as multiples of it with its nprobe; 0 stands
#: for the keys themselves.
NPROBES, CODES = (1, 4, 16, 128), (0.25, 0.5, 2.0, 0.0)
#: Parts of the true neighbors that the controls keep.
PARTS = (0.25, 0.5, 0.75)


LISTS, CODE_BYTES = "more lists", "longer codes"
NEAREST, LOT = "nearest true neighbors", "true neighbors by lot"
ROADS = (LISTS, CODE_BYTES)


@dataclass(frozen=True)
class Stop:
    """One index setting on the way: `factory` None is the preset's own."""

    road: str  # one of `ROADS`, or of the controls
    lists: int | None
    code: str | None
    nprobe: int | None
    factory: str | None


@dataclass(frozen=True)
class Point:
    """A stop under one score, against exact search of the same datastore."""

    fraction: float
    stop: Stop
    score: str
    fitted: Fitted
    recall: float
    empty: float
    against_exact: Gain


def run(lab: Lab) -> Findings:
    """All stops of all datastores; the best approximate one is chosen on valid."""
    fractions = tuple(_option(lab, "fractions", FRACTIONS))
    exacts: dict[float, Fitted] = {}
    points: list[Point] = []
    for fraction in fractions:
        exact = _search(lab, Setting(fraction=fraction))
        exacts[fraction] = _fit(lab, exact)
        for stop in stops(lab, fraction):
            points += _points(lab, fraction, stop, exact, exacts[fraction])
        points += _controls(lab, fraction, exact, exacts[fraction])
    best = {f: _best(points, f) for f in fractions}
    scores = _score_contrasts(lab, points, fractions)
    return Findings(
        rows=[_exact_row(f, exact) for f, exact in exacts.items()] + [_row(p) for p in points],
        agreement=together(*(holds(p.against_exact.interval) for p in best.values())),
        words=_words(best, scores, points),
        headline="best approximate against exact: "
        + "; ".join(f"{p.against_exact} at {100 * f:.3g} %" for f, p in best.items()),
        series={
            "points": [_plain(p) for p in points],
            "exact": {f"{f:.3g}": exact.mixture.to_dict() for f, exact in exacts.items()},
        },
        details={
            "best": {f"{f:.3g}": _plain(p) for f, p in best.items()},
            "FAISS score over real score": {f"{f:.3g}": g.to_dict() for f, g in scores.items()},
            "surely better than exact": [_plain(p) for p in points if _sure(p)],
        },
    )


def stops(lab: Lab, fraction: float) -> list[Stop]:
    """Both roads, without those that this index cannot have."""
    index = lab.faiss(lab.store(fraction=fraction))
    lists, code = parse_factory(index.factory)
    found = []
    for nprobe in sorted({*_option(lab, "nprobes", NPROBES), lab.preset.nprobe}):
        if nprobe < lists or nprobe == lab.preset.nprobe:
            found.append(Stop(LISTS, lists, code, nprobe, None))
    if _option(lab, "all_lists_below", 100_000) > len(lab.store(fraction=fraction)):
        found.append(Stop(LISTS, lists, code, lists, None))
    for other in codes(code, index.datastore.dim, _option(lab, "codes", CODES)):
        found.append(Stop(CODE_BYTES, lists, other, lab.preset.nprobe, f"IVF{lists},{other}"))
    return found


def parse_factory(factory: str) -> tuple[int, str]:
    """(lists, code) of a factory such as `"IVF1024,PQ16"`; ValueError for another kind."""
    match = re.fullmatch(r"IVF(\d+),(PQ\d+\S*|SQ\d+|Flat)", factory)
    if match is None:
        raise ValueError(
            f"this experiment varies lists and codes of an index such as 'IVF1024,PQ16'; the "
            f"preset's index is {factory!r}: set factory, or more entries"
        )
    return int(match[1]), match[2]


def codes(code: str, dim: int, factors: Sequence[float]) -> list[str]:
    """Product codes of other sizes, as far as they divide the dimensions, and the keys."""
    size = int(found[1]) if (found := re.match(r"PQ(\d+)", code)) else dim
    wanted = [round(size * factor) for factor in factors if factor]
    fitting = [f"PQ{m}" for m in wanted if 0 < m != size and dim % m == 0]
    return fitting + (["Flat"] if 0 in factors and code != "Flat" else [])


def _option(lab: Lab, name: str, default: Any) -> Any:
    return lab.preset.option(f"approximation.{name}", default)


def _search(lab: Lab, setting: Setting, **index: Any) -> dict[str, StreamScores]:
    return {name: lab.neighbors(setting, name, **index) for name in EVALUATED}


def _fit(lab: Lab, found: dict[str, StreamScores]) -> Fitted:
    grid = _option(lab, "temperatures", DEFAULT_TEMPERATURES)
    return fit_component(
        *lab.splits(),
        lambda name, t: found[name].log_p_knn(t),
        grid,
        resamples=lab.preset.resamples,
    )


def _points(
    lab: Lab, fraction: float, stop: Stop, exact: dict[str, StreamScores], best: Fitted
) -> list[Point]:
    """The stop under FAISS's scores and under real ones."""
    index: dict[str, Any] = {"nprobe": stop.nprobe, "factory": stop.factory}
    if stop.factory is not None:
        # Codes are compared under one training: that of the preset's own index.
        recipe = lab.faiss(lab.store(fraction=fraction)).sidecar.recipe
        index["train_size"] = recipe.train_size
    out, kept = [], 0.0
    for score in ("real", "faiss"):
        setting = Setting(mask="faiss", score=score, fraction=fraction)
        found = _search(lab, setting, **index)
        if score == "real":
            kept = float(recall(found["test"], exact["test"]).mean())
        fitted = _fit(lab, found)
        gain = advantage(lab.split("test"), fitted.log_p, best.log_p, lab.preset.resamples)
        empty = float((found["test"].tokens < 0).double().mean())
        out.append(Point(fraction, stop, score, fitted, kept, empty, gain))
    return out


def _controls(
    lab: Lab, fraction: float, exact: dict[str, StreamScores], best: Fitted
) -> list[Point]:
    """Parts of the true neighbors: the nearest, and some drawn by lot."""
    out = []
    for road, part in product((NEAREST, LOT), _option(lab, "parts", PARTS)):
        found = {
            name: scores.truncate(max(1, round(part * scores.k)))
            if road == NEAREST
            else thin(scores, part)
            for name, scores in exact.items()
        }
        fitted = _fit(lab, found)
        gain = advantage(lab.split("test"), fitted.log_p, best.log_p, lab.preset.resamples)
        stop = Stop(road, None, None, None, None)
        out.append(Point(fraction, stop, "real", fitted, part, 0.0, gain))
    return out


def _best(points: Sequence[Point], fraction: float) -> Point:
    """The stop and score with the lowest loss on valid, among those that are approximate."""
    return min(
        (p for p in points if p.fraction == fraction and p.stop.road in ROADS and p.recall < 1),
        key=lambda p: p.fitted.valid_nll,
    )


def _score_contrasts(
    lab: Lab, points: Sequence[Point], fractions: Sequence[float]
) -> dict[float, Gain]:
    """FAISS's scores over real ones on the neighbors of the preset's own index."""
    by: dict[tuple[float, str], Tensor] = {
        (p.fraction, p.score): p.fitted.log_p
        for p in points
        if p.stop.factory is None and p.stop.nprobe == lab.preset.nprobe
    }
    test, resamples = lab.split("test"), lab.preset.resamples
    return {f: advantage(test, by[f, "faiss"], by[f, "real"], resamples) for f in fractions}


def _sure(point: Point) -> bool:
    return point.against_exact.interval.low > 0


def _exact_row(fraction: float, exact: Fitted) -> dict[str, Any]:
    index = {"fraction": fraction, "search": "exact", "lists": None, "nprobe": None, "code": None}
    return {**index, "score": "real", "recall": 1.0, "empty": 0.0, **_figures(exact, None)}


def _row(p: Point) -> dict[str, Any]:
    search = "FAISS" if p.stop.road in ROADS else p.stop.road
    index: dict[str, Any] = {"fraction": p.fraction, "search": search, "lists": p.stop.lists}
    index |= {"nprobe": p.stop.nprobe, "code": p.stop.code, "score": p.score}
    figures = _figures(p.fitted, p.against_exact)
    return {**index, "recall": p.recall, "empty": p.empty, **figures}


def _figures(fitted: Fitted, against_exact: Gain | None) -> dict[str, Any]:
    m = fitted.mixture
    return {
        "t": m.temperature,
        "lmbda": m.lmbda,
        "perplexity": m.mixture,
        "change": str(Gain(m.gain, m.interval)),
        "against exact": None if against_exact is None else str(against_exact),
        f"paper's way: per {m.paper['per']}": m.paper["mixture"],
    }


def _plain(p: Point) -> dict[str, Any]:
    return {
        "fraction": p.fraction,
        "road": p.stop.road,
        "lists": p.stop.lists,
        "code": p.stop.code,
        "nprobe": p.stop.nprobe,
        "score": p.score,
        "recall": p.recall,
        "against_exact": p.against_exact.to_dict(),
    }


def _words(best: dict[float, Point], scores: dict[float, Gain], points: Sequence[Point]) -> str:
    tried = [p for p in points if p.stop.road in ROADS]
    count = f"{sum(map(_sure, tried))} of {len(tried)} approximate searches beat exact search for "
    return f"{count}sure. " + " ".join(
        f"At {100 * f:.3g} % of the datastore the best approximate search on valid ({p.stop.code}, "
        f"{p.stop.nprobe} of {p.stop.lists} lists, {p.score} score) keeps {p.recall:.0%} of the "
        f"true neighbors and changes perplexity on test by {p.against_exact} against exact "
        f"search; FAISS's score instead of the real one changes it by {scores[f]}."
        for f, p in best.items()
    )


_LINES = (*product(ROADS, ("real", "faiss")), (NEAREST, "real"), (LOT, "real"))
_CONTROLS = {NEAREST: "the nearest true neighbors alone", LOT: "true neighbors, drawn by lot"}
_STROKES: dict[str, dict[str, Any]] = {
    LISTS: {"linestyle": "-"},
    CODE_BYTES: {"linestyle": ":", "markerfacecolor": "white"},
    NEAREST: {"linestyle": "--", "marker": "v"},
    LOT: {"linestyle": "-.", "marker": "P"},
}


def plot(result: dict[str, Any], axes: Any) -> None:
    """Change of perplexity against exact search, by recall, one panel a size.

    Most of it lies near 0 and some far off: the scale is even within a tenth of a percent and
    logarithmic beyond. Colours are those of the ways of searching, lines those of the roads.
    """
    figure, series = axes.figure, result["series"]
    axes.remove()
    fractions = sorted({p["fraction"] for p in series["points"]})
    figure.set_size_inches(5.2 * len(fractions) if len(fractions) > 1 else 7.2, 5.6)
    panels = figure.subplots(1, len(fractions), sharey=True, squeeze=False)[0]
    for panel, fraction in zip(panels, fractions, strict=True):
        here = [p for p in series["points"] if p["fraction"] == fraction]
        for road, score in _LINES:
            points = [p for p in here if (p["road"], p["score"]) == (road, score)]
            distances = "FAISS's distances" if score == "faiss" else "real distances"
            label = f"FAISS, {road}, {distances}" if road in ROADS else _CONTROLS[road]
            style = {**look("faiss" if road in ROADS else "exact", score), **_STROKES[road]}
            _line(panel, sorted(points, key=lambda p: p["recall"]), label, **style)
        panel.axhline(0, color=MUTED, linewidth=1.0, linestyle="--", label="exact search")
        panel.set_yscale("symlog", linthresh=0.1, linscale=0.6)
        plain_ticks(panel.yaxis)
        dress(
            panel,
            title=f"{100 * fraction:.3g} % of the datastore",
            xlabel="recall: share of the true neighbors found",
            ylabel="change of perplexity against exact search (test), %"
            if panel is panels[0]
            else "",
            legend=False,
        )
    legend_of_all(figure, panels[0])
    note(figure, "Above 0 exact search is better. Log scale beyond ±0.1 %; 95 % intervals.")


def _line(axes: Any, points: Sequence[dict[str, Any]], label: str, **style: Any) -> None:
    gains = [p["against_exact"] for p in points]
    x, y = [p["recall"] for p in points], [percent_change(g["value"]) for g in gains]
    axes.plot(x, y, label=label, markersize=5, linewidth=1.4, **style)
    for place, gain in zip(x, gains, strict=True):
        if gain["low"] is not None:
            ends = [percent_change(gain["low"]), percent_change(gain["high"])]
            axes.plot([place, place], ends, color=style["color"], linewidth=0.8, alpha=0.6)
