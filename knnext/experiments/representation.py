"""Which state the datastore holds, and how states are compared: the paper's main table.

Every member is reported twice. With t = 1, as the paper did: but t is a scale, and inner products
are of another scale than squared distances, and states of one layer longer than those of another.
At t = 1 members differ by their scale too. With t fitted on valid that is taken out.

FAISS's own scores under inner products are coarser than under l2, not by nature: its k-means for
inner products makes centroids of length one, so the residuals that codes stand for are nearly as
long as the keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any

from torch import Tensor

from knnext.evaluation.scores import mix_log_probs
from knnext.experiments.lab import Lab
from knnext.experiments.lab.claims import exceeds, negligible, together
from knnext.experiments.lab.contrast import Gain, advantage
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.mixture import DEFAULT_TEMPERATURES, FLOOR, LogP, Mixture, Split, mix
from knnext.experiments.lab.results import (
    Agreement,
    Description,
    Findings,
    PaperFigure,
    percent_interval,
)
from knnext.experiments.lab.sweep import refine

DESCRIPTION = Description(
    name="representation",
    title="Representation and distance",
    question="Which state should the datastore hold, and does the distance matter?",
    claim="The state matters much. (Recalled, unverified: att helps far more than ffn; for att, "
    "squared distances and inner products differ little.)",
    varies="h_ds (att, ffn) and the product (l2, ip); true and FAISS neighbors; t fitted and t = 1",
    paper=(
        PaperFigure("norms drawn up to 7 for att and up to 75 for ffn states; t = 1", "code"),
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
ATT, L2 = "att over ffn", "l2 over ip"
CODES, MASK = "FAISS score over real", "FAISS mask over exact"


@dataclass(frozen=True)
class Member:
    """One line of the table: its figures and, on test, (n,) log p of component and mixture."""

    setting: Setting
    how: str
    figures: Mixture
    alone: Tensor
    mixed: Tensor


@dataclass(frozen=True)
class Pair:
    """Two members that differ in one setting; `fixed` is the other, `t` whether it was fitted."""

    pair: str
    fixed: str
    mask: str
    score: str
    t: str


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
    for how, temperatures in ((FITTED, refine(valid, log_p, grid)), (ONE, (1.0,))):
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
        "change": change(f),
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


def compare(members: Sequence[Member], test: Split, resamples: int) -> dict[Pair, Gain]:
    """Paired gains of att over ffn for each metric, of l2 over ip for each state, of FAISS's
    scores over real ones on FAISS's mask, and of FAISS's mask over the true neighbors."""
    by = {(m.setting, m.how): m.mixed for m in members}
    pairs = {}
    for (mask, score), how in product(SEARCHES, (FITTED, ONE)):
        wanted = [(ATT, metric, ("att", metric), ("ffn", metric)) for metric in METRICS]
        wanted += [(L2, state, (state, "l2"), (state, "ip")) for state in STATES]
        for name, fixed, *both in wanted:
            better, worse = (
                by[Setting(h_ds=state, metric=metric, mask=mask, score=score), how]
                for state, metric in both
            )
            pair = Pair(name, fixed, mask, score, how)
            pairs[pair] = advantage(test, better, worse, resamples)
    for state, metric in product(STATES, METRICS):
        codes, real = (
            by[Setting(h_ds=state, metric=metric, mask="faiss", score=score), FITTED]
            for score in ("faiss", "real")
        )
        pair = Pair(CODES, f"{state} {metric}", "faiss", "both", FITTED)
        pairs[pair] = advantage(test, codes, real, resamples)
        true = by[Setting(h_ds=state, metric=metric), FITTED]
        pair = Pair(MASK, f"{state} {metric}", "both", "real", FITTED)
        pairs[pair] = advantage(test, real, true, resamples)
    return pairs


def conclude(
    rows: list[dict[str, Any]], members: Sequence[Member], pairs: dict[Pair, Gain]
) -> Findings:
    """Three parts, of true neighbors and real scores: att beats ffn by more than 1 % of perplexity
    under both metrics at t = 1; it does with t fitted; for att and t fitted, l2 and ip lie within
    1 % of each other."""

    def found(name: str, fixed: str, how: str) -> Gain:
        return pairs[Pair(name, fixed, "exact", "real", how)]

    one, fitted = ([found(ATT, metric, how) for metric in METRICS] for how in (ONE, FITTED))
    distance = found(L2, "att", FITTED)
    parts: dict[str, Agreement] = {
        "att matters at t = 1": together(*(exceeds(g.interval) for g in one)),
        "att matters with t fitted": together(*(exceeds(g.interval) for g in fitted)),
        "l2 and ip differ little for att": negligible(distance.interval),
    }
    codes = [pairs[Pair(CODES, f"att {x}", "faiss", "both", FITTED)] for x in METRICS]
    masks = [
        f"{pairs[Pair(MASK, both, 'both', 'real', FITTED)]} ({both})"
        for both in (f"{state} {metric}" for state, metric in product(STATES, METRICS))
    ]
    exact = [m for m in members if m.setting.mask == "exact" and m.how == FITTED]
    changes = ", ".join(
        f"{m.setting.h_ds} {m.setting.metric} {change(m.figures)} (t {m.figures.temperature:.3g})"
        for m in exact
    )
    words = (
        f"att instead of ffn changes perplexity by {one[0]} (l2) and {one[1]} (ip) at t = 1, and "
        f"by {fitted[0]} and {fitted[1]} with t fitted: t is a scale, and t = 1 compares scales "
        f"too. l2 instead of ip, for att: {found(L2, 'att', ONE)} at t = 1, {distance} fitted. "
        f"FAISS's scores instead of real ones, for att: {codes[0]} (l2), {codes[1]} (ip). "
        f"FAISS's neighbors instead of the true ones, with real scores: {', '.join(masks)}. "
        f"Against the LM, fitted: {changes}."
    )
    return Findings(
        rows=rows,
        agreement=together(*parts.values()),
        words=words,
        headline=f"att instead of ffn (l2): {one[0]} at t = 1, {fitted[0]} with t fitted",
        details={
            "parts": parts,
            "pairs": [{**asdict(pair), **gain.to_dict()} for pair, gain in pairs.items()],
            "members": [
                {"setting": m.setting.to_dict(), "t": m.how, **m.figures.to_dict()} for m in members
            ],
        },
    )


def change(figures: Mixture) -> str:
    """The change of perplexity that a component brings, with its interval."""
    return percent_interval(figures.gain, figures.interval.low, figures.interval.high)


def plot(result: dict[str, Any], axes: Any) -> None:
    """Change of perplexity by member, one mark for each way of searching and of choosing t."""
    from knnext.experiments.lab import figures

    members = result["details"]["members"]
    pairs = list(product(STATES, METRICS))
    shown = (
        ("exact", "real", FITTED),
        ("exact", "real", ONE),
        ("faiss", "real", FITTED),
        ("faiss", "faiss", FITTED),
    )
    for number, (mask, score, how) in enumerate(shown):
        name = f"{figures.searched(mask, score)}, {'t = 1' if how == ONE else 't fitted'}"
        style = {**figures.look(mask, score), "linestyle": "none"}
        if how == ONE:
            style["markerfacecolor"] = "white"
        for m in members:
            setting, interval = m["setting"], m["interval"]
            if (setting["mask"], setting["score"], m["t"]) != (mask, score, how):
                continue
            place = len(pairs) - pairs.index((setting["h_ds"], setting["metric"]))
            y = place - 0.17 * (number - 1.5)
            if interval["low"] is not None and interval["high"] is not None:
                ends = [figures.percent_change(interval[end]) for end in ("low", "high")]
                line = ":" if how == ONE else "-"
                axes.plot(ends, [y, y], color=style["color"], linewidth=1.2, linestyle=line)
            change = figures.percent_change(m["gain"])
            axes.plot([change], [y], markersize=6, label=name, **style)
            name = "_"  # once in the legend
    axes.axvline(0, color=figures.MUTED, linewidth=1.0, linestyle="--")
    figures.dress(
        axes,
        title="Perplexity by the state that is the key, and by the metric",
        xlabel=figures.CHANGE_LABEL,
        ylabel="",
        legend=False,
    )
    figures.legend_below(axes)
    labels = [f"{state},\n{figures.METRICS[metric]}" for state, metric in pairs]
    axes.set_yticks(range(len(labels), 0, -1), labels, color=figures.INK)
    figures.note(
        axes.figure,
        f"{figures.STATES_NOTE}\n95 % intervals, each against the LM alone: of two that overlap "
        "one may still be better for sure (the text has such pairs).",
    )
