"""Is it an ensemble that helps? Metrics, language models and the kNN mixed with fitted weights.

Weights lie on a simplex and are fitted on valid by expectation maximisation, where the loss has
one valley; the published code tried 100 values an axis on the split that it reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knnext.experiments.lab import EVALUATED, Lab
from knnext.experiments.lab.claims import negligible
from knnext.experiments.lab.contrast import Gain, advantage
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.figures import bars, dress, note, percent_change
from knnext.experiments.lab.mixture import (
    DEFAULT_TEMPERATURES,
    FLOOR,
    Split,
    fit,
    fit_weights,
    mix_many,
)
from knnext.experiments.lab.results import Description, Findings, PaperFigure

DESCRIPTION = Description(
    name="ensembling",
    title="Ensembles of metrics and models",
    question="Does a second metric or a second LM add to the kNN, and does the kNN still help an "
    "ensemble of LMs?",
    claim="Combining squared distances with inner products is ruled out as a reason for the gain: "
    "it adds nothing.",
    varies="the components of the mixture: LM, LM of another seed, kNN by l2, kNN by ip",
    paper=(
        PaperFigure("l2 with ip: ruled out", "digest"),
        PaperFigure("the base LM, one of seed 3, a 2V LM and the kNN, 100 weights an axis", "code"),
    ),
)

LM, OTHER, L2, IP = "LM", "second LM", "kNN l2", "kNN ip"
SYSTEMS = (
    (LM,),
    (OTHER,),
    (LM, L2),
    (LM, IP),
    (LM, L2, IP),
    (LM, OTHER),
    (OTHER, L2),
    (LM, OTHER, L2),
    (LM, OTHER, L2, IP),
)
#: What is asked: (name, mixture, mixture that lacks a component).
QUESTIONS = (
    ("kNN added to the LM", (LM, L2), (LM,)),
    ("second LM added to the LM", (LM, OTHER), (LM,)),
    ("kNN added to both LMs", (LM, OTHER, L2), (LM, OTHER)),
    ("second LM added to the LM and kNN", (LM, OTHER, L2), (LM, L2)),
    ("kNN instead of a second LM", (LM, L2), (LM, OTHER)),
)
#: The claim's question: the other mixture is the better one of a single metric, chosen on valid.
METRICS = "both metrics, against the better one"

Names = tuple[str, ...]


@dataclass(frozen=True)
class System:
    """A mixture: weights fitted on valid, and (n,) log p of the test targets.

    `valid_nll`: the loss that the fit reached. `paper`: perplexity per word (where words are known)
    with weights fitted on test itself.
    """

    weights: Tensor
    log_p: Tensor
    valid_nll: float
    paper: float


def run(lab: Lab) -> Findings:
    """All mixtures, and what each component adds where it is added."""
    valid, test = lab.splits()
    parts, temperatures = _components(lab)
    systems = {
        names: mix_system([parts[n] for n in names], valid, test)
        for names in SYSTEMS
        if all(n in parts for n in names)
    }
    resamples = lab.preset.resamples
    base = systems[LM,].log_p
    gains = {names: advantage(test, s.log_p, base, resamples) for names, s in systems.items()}
    single = min(((LM, L2), (LM, IP)), key=lambda names: systems[names].valid_nll)
    answers = {
        name: advantage(test, systems[more].log_p, systems[less].log_p, resamples)
        for name, more, less in ((METRICS, (LM, L2, IP), single), *QUESTIONS)
        if more in systems and less in systems
    }
    return Findings(
        rows=[_row(names, systems[names], gains[names], test) for names in systems],
        agreement=negligible(answers[METRICS].interval),
        words=_words(answers),
        headline=f"{METRICS}: {answers[METRICS]}",
        series={"answers": {name: gain.to_dict() for name, gain in answers.items()}},
        details={
            "temperatures": temperatures,
            "better metric on valid": single[1],
            "weights": {" + ".join(n): s.weights.tolist() for n, s in systems.items()},
            "second LM": OTHER in parts,
        },
    )


def mix_system(parts: Sequence[dict[str, Tensor]], valid: Split, test: Split) -> System:
    """Fit weights on valid; mix on test; the paper's way beside it.

    Args:
        parts: log p of the targets by split's name, one dict a component; for each target one of
            them must be finite.
    """
    stacks = {s.name: torch.stack([p[s.name].double() for p in parts]) for s in (valid, test)}
    weights = fit_weights(stacks[valid.name])
    floored = stacks[test.name].clamp_min(FLOOR)
    tuned = mix_many(floored, fit_weights(floored))
    per_word = test.counts.tokens / (test.counts.words or test.counts.tokens)
    paper = math.exp(-per_word * float(tuned.mean()))
    nll = -float(mix_many(stacks[valid.name], weights).mean())
    return System(weights, mix_many(stacks[test.name], weights), nll, paper)


def _components(lab: Lab) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """log p of the targets by component and split; the kNNs' temperatures, each fitted with the
    LM alone."""
    valid, _ = lab.splits()
    grid = lab.preset.option("ensembling.temperatures", DEFAULT_TEMPERATURES)
    parts = {LM: {name: lab.split(name).log_p_lm for name in EVALUATED}}
    temperatures = {}
    for name, metric in ((L2, "l2"), (IP, "ip")):
        log_p = lab.component(Setting(metric=metric))
        temperatures[name], _, _ = fit(valid, log_p, grid)
        parts[name] = {s: log_p(s, temperatures[name]) for s in EVALUATED}
    if lab.preset.model is None:  # a model that is given has no second one of its shape
        other = lab.lm(lab.preset.option("ensembling.seed", 1))
        parts[OTHER] = {name: lab.split(name, other).log_p_lm for name in EVALUATED}
    return parts, temperatures


def _row(names: Names, system: System, gain: Gain, test: Split) -> dict[str, Any]:
    weights = dict(zip(names, system.weights.tolist(), strict=True))
    return {
        "mixture": " + ".join(names),
        **{f"weight of {name}": weights.get(name) for name in (LM, OTHER, L2, IP)},
        "perplexity": math.exp(-float(system.log_p.mean())),
        "change against the LM": str(gain),
        f"paper's way: per {'word' if test.counts.words else 'token'}": system.paper,
    }


def _words(answers: dict[str, Gain]) -> str:
    """Every question with its change of perplexity."""
    listed = "; ".join(f"{name}: {gain}" for name, gain in answers.items())
    still = answers.get("kNN added to both LMs")
    first = answers["kNN added to the LM"]
    help_ = " The LM was given, so there is no second one of another seed." if still is None else ""
    if still is not None and first.interval.low > 0:
        kept = still.value / first.value
        help_ = f" To the ensemble of two LMs the kNN adds {kept:.0%} of what it adds to one."
    return f"Change of perplexity on test, weights fitted on valid: {listed}.{help_}"


def plot(result: dict[str, Any], axes: Any) -> None:
    """What each addition changes."""
    answers = result["series"]["answers"]
    axes.figure.set_size_inches(8.4, 4.2)
    intervals = [
        (None, None)
        if gain["low"] is None
        else (percent_change(gain["high"]), percent_change(gain["low"]))
        for gain in answers.values()
    ]
    values = [percent_change(gain["value"]) for gain in answers.values()]
    bars(axes, [name.replace(", ", ",\n") for name in answers], values, intervals)
    dress(
        axes,
        title="What is added, and what it changes",
        xlabel="change of perplexity by the addition (test), %",
        ylabel="",
    )
    note(axes.figure, "Both metrics: inner products beside squared distances.")
