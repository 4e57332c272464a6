"""Is it sparsity that helps? The LM's own output cut to its top entries, mixed with itself.

The kNN distribution is sparse: most tokens have probability 0. If that were its merit, the LM's
distribution cut to its m most probable tokens and renormalised would make a good second component.

A cut also sharpens. An LM whose tail holds too much gains from that, sparse or not, so all is done
once more with an LM whose softmax has a temperature fitted on valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from knnext.experiments.lab import EVALUATED, Lab
from knnext.experiments.lab.claims import holds, negligible, together
from knnext.experiments.lab.contrast import Gain, advantage
from knnext.experiments.lab.cut import Cuts, cut, target_log_p
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.figures import (
    COLORS,
    dress,
    legend_below,
    line,
    note,
    percent_change,
    plain_ticks,
    reference_line,
)
from knnext.experiments.lab.mixture import (
    DEFAULT_TEMPERATURES,
    Mixture,
    Split,
    by_name,
    fit_lmbda,
    mix,
)
from knnext.experiments.lab.results import Agreement, Description, Findings, PaperFigure, percent

DESCRIPTION = Description(
    name="sparsification",
    title="Sparsity of the output",
    question="Does the LM gain from its own output distribution, cut to its top entries?",
    claim="Sparsifying the LM's output and mixing it with the LM gives no gain.",
    varies="the entries that are kept, 1 to the whole vocabulary; the LM as it is and calibrated",
    paper=(
        PaperFigure("no gain", "digest"),
        PaperFigure("cutting means keeping the top entries and renormalising", "recalled"),
    ),
)

KEPT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
#: Of the LM's softmax; below 1 it is sharpened.
LM_TEMPERATURES = tuple(round(0.5 + 0.05 * i, 2) for i in range(21))


@dataclass(frozen=True)
class Series:
    """One LM mixed with every cut of its own output; the place `chosen` on valid.

    `masses` and `hits`: shares of the probability and of the targets of test that a cut keeps.
    """

    splits: tuple[Split, Split]
    kept: tuple[int, ...]
    masses: list[float]
    hits: list[float]
    mixtures: list[Mixture]
    chosen: int

    @property
    def best(self) -> Mixture:
        return self.mixtures[self.chosen]


def run(lab: Lab) -> Findings:
    """Every cut mixed with the LM, as it is and calibrated; the best cut is chosen on valid."""
    temperature = calibrate(lab)
    plain, sharp = (mix_cuts(lab, t) for t in (1.0, temperature))
    grid = lab.preset.option("sparsification.temperatures", DEFAULT_TEMPERATURES)
    knn = mix(*plain.splits, lab.component(Setting()), grid, resamples=lab.preset.resamples)
    test, resamples = plain.splits[1], lab.preset.resamples
    calibrated = advantage(test, sharp.splits[1].log_p_lm, test.log_p_lm, resamples)
    gains = [Gain(s.best.gain, s.best.interval) for s in (plain, sharp)]
    beside = Gain(knn.gain, knn.interval)
    return Findings(
        rows=[*_rows(plain, "as it is"), *_rows(sharp, f"t = {temperature:.2f}"), _knn_row(knn)],
        agreement=together(judge(plain.best), judge(sharp.best)),
        words=_words(plain, temperature, gains, calibrated, beside),
        headline=f"{gains[0]}; LM calibrated first: {gains[1]} (kNN: {beside})",
        series={"as it is": _plain(plain), "calibrated": _plain(sharp), "knn": knn.gain},
        details={
            "LM temperature": temperature,
            "calibration": calibrated.to_dict(),
            "chosen on valid": {
                "as it is": plain.kept[plain.chosen],
                "calibrated": sharp.kept[sharp.chosen],
            },
            "best": plain.best.to_dict(),
            "best, calibrated": sharp.best.to_dict(),
            "kNN": knn.to_dict(),
        },
    )


def _words(
    plain: Series, temperature: float, gains: Sequence[Gain], calibrated: Gain, knn: Gain
) -> str:
    m = plain.kept[plain.chosen]
    return (
        f"The best cut on valid keeps {m} of {plain.kept[-1]} tokens, with weight "
        f"{plain.best.lmbda:.3f}, and changes perplexity on test by {gains[0]}; the kNN changes it "
        f"by {knn}. Those {m} tokens hold {plain.masses[plain.chosen]:.1%} of the LM's probability "
        f"and {plain.hits[plain.chosen]:.1%} of the targets. Fitting the temperature of the LM's "
        f"own softmax ({temperature:.2f}) changes perplexity by {calibrated}; after that the best "
        f"cut changes it by {gains[1]}."
    )


def calibrate(lab: Lab) -> float:
    """The temperature of the LM's softmax with the lowest loss on valid."""
    states, lm = lab.states("valid", "ffn"), lab.lm()
    output, bias = lm.output_embedding, lm.output_bias
    return max(
        lab.preset.option("sparsification.lm_temperatures", LM_TEMPERATURES),
        key=lambda t: float(target_log_p(states.keys, output, bias, states.targets, t).mean()),
    )


def mix_cuts(lab: Lab, temperature: float) -> Series:
    """The LM with softmax(logits / temperature), mixed with each cut of itself."""
    cuts = {name: _cuts(lab, name, temperature) for name in EVALUATED}
    whole = {name: c.log_p[-1] for name, c in cuts.items()}
    valid, test = (replace(s, log_p_lm=whole[s.name]) for s in lab.splits())
    kept = cuts[valid.name].kept
    mixtures, losses = [], []
    for number in range(len(kept)):
        parts = {name: c.log_p[number] for name, c in cuts.items()}
        component = by_name((valid, test), parts)
        mixtures.append(mix(valid, test, component, resamples=lab.preset.resamples))
        losses.append(fit_lmbda(valid.log_p_lm, parts[valid.name])[1])
    found = cuts[test.name]
    hits = found.log_p.isfinite().double().mean(1).tolist()
    best = losses.index(min(losses))
    return Series((valid, test), kept, found.mass.tolist(), hits, mixtures, best)


def judge(best: Mixture) -> Agreement:
    """Of "no gain": agrees where the gain is below 1 % for sure, or the fit gives it no weight;
    disagrees where it is above zero for sure and not below 1 %."""
    if best.lmbda == 0 or negligible(best.interval) == "agrees" or best.interval.high <= 0:
        return "agrees"
    return "disagrees" if holds(best.interval) == "agrees" else "undecided"


def _cuts(lab: Lab, split: str, temperature: float) -> Cuts:
    lm = lab.lm()
    vocab = lm.output_embedding.shape[0]
    wanted = [m for m in lab.preset.option("sparsification.kept", KEPT) if m < vocab]
    states = lab.states(split, "ffn")
    bias = None if lm.output_bias is None else lm.output_bias / temperature
    output = lm.output_embedding / temperature
    return cut(states.keys, output, bias, states.targets, [*wanted, vocab])


def _rows(series: Series, lm: str) -> list[dict[str, Any]]:
    places = zip(series.kept, series.masses, series.hits, series.mixtures, strict=True)
    return [
        {"LM": lm, "kept": str(m), "probability kept": p, "targets kept": hit, **_figures(x)}
        for m, p, hit, x in places
    ]


def _knn_row(knn: Mixture) -> dict[str, Any]:
    kept = {"kept": "kNN-LM", "probability kept": None, "targets kept": None}
    return {"LM": "as it is", **kept, **_figures(knn)}


def _figures(m: Mixture) -> dict[str, Any]:
    return {
        "lmbda": m.lmbda,
        "alone": m.alone,
        "perplexity": m.mixture,
        "oracle": m.oracle,
        "change": str(Gain(m.gain, m.interval)),
        "paper's way: lmbda": m.paper["lmbda"],
        f"paper's way: per {m.paper['per']}": m.paper["mixture"],
        f"paper's way: base per {m.paper['per']}": m.paper["base"],
    }


def _plain(series: Series) -> dict[str, Any]:
    return {
        "kept": list(series.kept),
        "gain": [x.gain for x in series.mixtures],
        "low": [x.interval.low for x in series.mixtures],
        "high": [x.interval.high for x in series.mixtures],
        "lmbda": [x.lmbda for x in series.mixtures],
        "mass": series.masses,
    }


def plot(result: dict[str, Any], axes: Any) -> None:
    """Change of perplexity by the number of tokens kept, beside the kNN's."""
    series = result["series"]
    for name, number in (("as it is", 0), ("calibrated", 4)):
        s = series[name]
        label = f"LM {name}, with its own output cut"
        line(axes, s["kept"], [percent_change(gain) for gain in s["gain"]], label, number)
        if s["low"][0] is not None:
            ends = [[percent_change(value) for value in s[end]] for end in ("low", "high")]
            axes.fill_between(s["kept"], *ends, color=COLORS[number], alpha=0.15, linewidth=0)
    reference_line(axes, 0.0, "LM alone")
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis)
    dress(
        axes,
        title="The LM mixed with its own output, cut to its likeliest tokens",
        xlabel="tokens kept, log scale",
        ylabel="change of perplexity (test), %",
        legend=False,
    )
    legend_below(axes)
    knn = percent(series["knn"]).replace("-", "−")
    note(axes.figure, f"Bands: 95 % intervals. The neighbors in its place: {knn}.")
