"""Which state the datastore holds, and how states are compared: the paper's main table.

Every member is reported twice. With t = 1, as the paper did: but t is a scale, and inner products
are of another scale than squared distances, and states of one layer longer than those of another.
At t = 1 members differ by their scale too. With t fitted on valid that is taken out, and the
verdict goes by this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from torch import Tensor

from knnext.bootstrap import Interval
from knnext.experiments.claims import holds, negligible, together
from knnext.experiments.family import Setting
from knnext.experiments.lab import Lab
from knnext.experiments.mixture import (
    DEFAULT_TEMPERATURES,
    FLOOR,
    LogP,
    Mixture,
    Split,
    difference,
    mix,
)
from knnext.experiments.results import Description, Findings, PaperFigure, percent_interval
from knnext.scores import mix_log_probs

DESCRIPTION = Description(
    name="representation",
    title="Representation and distance",
    question="Which state should the datastore hold, and does the distance matter?",
    claim="The state matters much: att helps far more than ffn. For att, squared distances and "
    "inner products differ little.",
    varies="h_ds (att, ffn) and the product (l2, ip); true and FAISS neighbors; t fitted and t = 1",
    paper=(
        PaperFigure("base 21.755; one kNN-LM 19.175 at lmbda 0.263 (valid, per word)", "code"),
        PaperFigure("att l2: 19.174 at lmbda 0.271, oracle 14.230", "recalled"),
        PaperFigure("att ip: 19.095 at lmbda 0.266, oracle 14.077", "recalled"),
        PaperFigure("ffn l2: 20.734 at lmbda 0.065, oracle 15.594", "recalled"),
        PaperFigure("ffn ip: 21.101 at lmbda 0.050, oracle 16.254", "recalled"),
    ),
)

STATES, METRICS = ("att", "ffn"), ("l2", "ip")
SEARCHES = (("exact", "real"), ("faiss", "real"), ("faiss", "faiss"))
FITTED, ONE = "fitted", "t = 1"


@dataclass(frozen=True)
class Member:
    """One line of the table: its figures and, on test, (n,) log p of component and mixture."""

    setting: Setting
    how: str
    figures: Mixture
    alone: Tensor
    mixed: Tensor


def run(lab: Lab) -> Findings:
    """Fit and report all members; compare att with ffn, and l2 with ip, on the same documents."""
    splits = lab.splits()
    grid = sorted({1.0, *lab.preset.option("representation.temperatures", DEFAULT_TEMPERATURES)})
    members: list[Member] = []
    for (mask, score), state, metric in product(SEARCHES, STATES, METRICS):
        setting = Setting(h_ds=state, metric=metric, mask=mask, score=score)
        members += member(lab, splits, setting, grid)
    pairs = compare(members, splits[1], lab.preset.resamples)
    sizes = {state: lab.store(state).num_entries * lab.store(state).dim for state in STATES}
    return conclude(
        [row(m, splits[1], sizes[m.setting.h_ds], grid) for m in members], members, pairs
    )


def member(
    lab: Lab, splits: tuple[Split, Split], setting: Setting, grid: Sequence[float]
) -> list[Member]:
    """A member with t fitted and with t = 1, from one search."""
    valid, test = splits
    log_p: LogP = cache(lab.component(setting))
    found = []
    for how, temperatures in ((FITTED, grid), (ONE, (1.0,))):
        figures = mix(valid, test, log_p, temperatures, resamples=lab.preset.resamples)
        alone = log_p(test.name, figures.temperature)
        mixed = mix_log_probs(test.log_p_lm.double(), alone, figures.lmbda)
        found.append(Member(setting, how, figures, alone, mixed))
    return found


def row(m: Member, test: Split, parameters: int, grid: Sequence[float]) -> dict[str, Any]:
    """The table's line. Under the floor the component alone has a finite, absurd perplexity: its
    power of ten is given."""
    f, paper = m.figures, m.figures.paper
    per_word = test.counts.tokens / (test.counts.words or test.counts.tokens)
    floored = -per_word * float(m.alone.clamp_min(FLOOR).mean()) / math.log(10)
    return {
        "h_ds": m.setting.h_ds,
        "metric": m.setting.metric,
        "mask": m.setting.mask,
        "score": m.setting.score,
        "t": f.temperature,
        "t is": "1" if m.how == ONE else "fitted, at an end" if at_end(f, grid) else "fitted",
        "lmbda": f.lmbda,
        "kNN only": f.alone,
        "targets found": float(m.alone.isfinite().double().mean()),
        "mixture": f.mixture,
        "oracle": f.oracle,
        "change": percent_interval(f.gain, f.interval.low, f.interval.high),
        "extra parameters": parameters,
        "kNN only with floor, log10 per word": floored,
        "paper's way: t": paper["temperature"],
        "paper's way: lmbda": paper["lmbda"],
        f"paper's way: mixture per {paper['per']}": paper["mixture"],
        f"paper's way: oracle per {paper['per']}": paper["oracle"],
    }


def at_end(figures: Mixture, grid: Sequence[float]) -> bool:
    """Whether the fitted temperature is the grid's lowest or highest: a better one may lie past."""
    return figures.lmbda > 0 and figures.temperature in (grid[0], grid[-1])


def compare(members: Sequence[Member], test: Split, resamples: int) -> list[dict[str, Any]]:
    """Paired gains of att over ffn for each metric, and of l2 over ip for each state."""
    by = {(m.setting, m.how): m.mixed for m in members}
    pairs = []
    for (mask, score), how in product(SEARCHES, (FITTED, ONE)):
        wanted = [("att over ffn", x, ("att", x), ("ffn", x)) for x in METRICS]
        wanted += [("l2 over ip", s, (s, "l2"), (s, "ip")) for s in STATES]
        for name, fixed, better, worse in wanted:
            a, b = (
                by[Setting(h_ds=state, metric=metric, mask=mask, score=score), how]
                for state, metric in (better, worse)
            )
            interval = difference(test, a, b, resamples)
            pair = {"pair": name, "with": fixed, "mask": mask, "score": score, "t is": how}
            gain = {"gain": float((a - b).mean()), "low": interval.low, "high": interval.high}
            pairs.append({**pair, **gain})
    return pairs


def conclude(
    rows: list[dict[str, Any]], members: Sequence[Member], pairs: Sequence[dict[str, Any]]
) -> Findings:
    """Agrees in whole where att beats ffn under both metrics and, for att, l2 and ip lie within
    1 % of each other: true neighbors, real scores, t fitted."""
    fitted, one = (
        {(p["pair"], p["with"]): p for p in pairs if p["mask"] == "exact" and p["t is"] == how}
        for how in (FITTED, ONE)
    )
    state = together(*(holds(_interval(fitted["att over ffn", x])) for x in METRICS))
    distance = negligible(_interval(fitted["l2 over ip", "att"]))
    exact = [m for m in members if m.setting.mask == "exact" and m.how == FITTED]
    listed = ", ".join(
        f"{m.setting.h_ds} {m.setting.metric} {_shown(m.figures.to_dict())}" for m in exact
    )
    words = (
        f"With t fitted, perplexity changes by {listed}. att instead of ffn: "
        f"{_shown(fitted['att over ffn', 'l2'])} (l2) and {_shown(fitted['att over ffn', 'ip'])} "
        f"(ip); l2 instead of ip for att: {_shown(fitted['l2 over ip', 'att'])}. At t = 1 these "
        f"are {_shown(one['att over ffn', 'l2'])}, {_shown(one['att over ffn', 'ip'])} and "
        f"{_shown(one['l2 over ip', 'att'])}: t is a scale, so t = 1 compares scales too."
    )
    return Findings(
        rows=rows,
        agreement=together(state, distance),
        words=words,
        headline=f"att instead of ffn: {_shown(fitted['att over ffn', 'l2'])} (l2)",
        details={
            "pairs": list(pairs),
            "parts": {"att beats ffn": state, "l2 and ip differ little for att": distance},
            "members": [
                {"setting": m.setting.to_dict(), "t is": m.how, **m.figures.to_dict()}
                for m in members
            ],
        },
    )


def plot(result: dict[str, Any], axes: Any) -> None:
    """Change of perplexity by member, one mark for each way of searching and of choosing t."""
    from knnext.experiments.figures import COLORS, INK, MARKERS, MUTED, dress

    members = result["details"]["members"]
    labels = [f"{state}, {metric}" for state, metric in product(STATES, METRICS)]
    shown = (
        ("true neighbors, t fitted", "exact", "real", FITTED),
        ("true neighbors, t = 1", "exact", "real", ONE),
        ("FAISS neighbors, real scores, t fitted", "faiss", "real", FITTED),
        ("FAISS neighbors and scores, t fitted", "faiss", "faiss", FITTED),
    )
    for number, (name, mask, score, how) in enumerate(shown):
        style = {"color": COLORS[number], "marker": MARKERS[number], "linestyle": "none"}
        for m in members:
            setting, interval = m["setting"], m["interval"]
            if (setting["mask"], setting["score"], m["t is"]) != (mask, score, how):
                continue
            place = len(labels) - labels.index(f"{setting['h_ds']}, {setting['metric']}")
            y = place - 0.17 * (number - 1.5)
            axes.plot([100 * math.expm1(-m["gain"])], [y], markersize=6, label=name, **style)
            name = "_"  # once in the legend
            if interval["low"] is not None and interval["high"] is not None:
                ends = [100 * math.expm1(-interval[end]) for end in ("low", "high")]
                axes.plot(ends, [y, y], color=COLORS[number], linewidth=1.2)
    axes.axvline(0, color=MUTED, linewidth=1.0, linestyle="--")
    dress(axes, title=result["title"], xlabel="change of perplexity in % (test)", ylabel="")
    axes.set_yticks(range(len(labels), 0, -1), labels, color=INK)


def _interval(pair: dict[str, Any]) -> Interval:
    return Interval(pair["low"], pair["high"], 0.95)


def _shown(figures: dict[str, Any]) -> str:
    interval = figures.get("interval", figures)
    return percent_interval(figures["gain"], interval["low"], interval["high"])
