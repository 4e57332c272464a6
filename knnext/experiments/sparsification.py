"""Is it sparsity that helps? The LM's own output cut to its top entries, mixed with itself.

The kNN distribution is sparse: most tokens have probability 0. If that were its merit, the LM's
distribution cut to its m most probable tokens and renormalised would make a good second component.
"""

from __future__ import annotations

from typing import Any

from knnext.experiments.claims import holds, negligible
from knnext.experiments.contrast import Gain
from knnext.experiments.cut import Cuts, cut
from knnext.experiments.family import Setting
from knnext.experiments.figures import COLORS, dress, percent_change, reference_line
from knnext.experiments.lab import Lab
from knnext.experiments.mixture import DEFAULT_TEMPERATURES, Mixture, by_name, fit_lmbda, mix
from knnext.experiments.results import Agreement, Description, Findings, PaperFigure

DESCRIPTION = Description(
    name="sparsification",
    title="Sparsity of the output",
    question="Does the LM gain from its own output distribution, cut to its top entries?",
    claim="Sparsifying the LM's output and mixing it with the LM gives no gain.",
    varies="the entries that are kept, 1 to the whole vocabulary; the kNN beside it",
    paper=(
        PaperFigure("no gain", "digest"),
        PaperFigure("cutting means keeping the top entries and renormalising", "recalled"),
    ),
)

KEPT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def run(lab: Lab) -> Findings:
    """Every cut mixed with the LM; the cut to report is chosen on valid."""
    valid, test = lab.splits()
    cuts = {split.name: _cuts(lab, split.name) for split in (valid, test)}
    kept = cuts[valid.name].kept
    mixtures: list[Mixture] = []
    losses: list[float] = []
    for number in range(len(kept)):
        parts = {name: c.log_p[number] for name, c in cuts.items()}
        component = by_name((valid, test), parts)
        mixtures.append(mix(valid, test, component, resamples=lab.preset.resamples))
        losses.append(fit_lmbda(valid.log_p_lm, parts[valid.name])[1])
    chosen = losses.index(min(losses))
    best = mixtures[chosen]
    grid = lab.preset.option("sparsification.temperatures", DEFAULT_TEMPERATURES)
    knn = mix(valid, test, lab.component(Setting()), grid, resamples=lab.preset.resamples)
    masses = cuts[test.name].mass.tolist()
    rows = [_row(str(m), mass, x) for m, mass, x in zip(kept, masses, mixtures, strict=True)]
    gain, beside = Gain(best.gain, best.interval), Gain(knn.gain, knn.interval)
    return Findings(
        rows=[*rows, _row("kNN-LM", None, knn)],
        agreement=judge(best),
        words=f"The best cut on valid keeps {kept[chosen]} of {kept[-1]} tokens, with weight "
        f"{best.lmbda:.3f}, and changes perplexity on test by {gain}; the kNN changes it by "
        f"{beside}.",
        headline=f"{gain} (kNN: {beside})",
        series={
            "kept": list(kept),
            "gain": [x.gain for x in mixtures],
            "low": [x.interval.low for x in mixtures],
            "high": [x.interval.high for x in mixtures],
            "lmbda": [x.lmbda for x in mixtures],
            "mass": masses,
            "knn": knn.gain,
        },
        details={"chosen on valid": kept[chosen], "best": best.to_dict(), "kNN": knn.to_dict()},
    )


def judge(best: Mixture) -> Agreement:
    """Of "no gain": agrees where the gain is below 1 % for sure, or the fit gives it no weight;
    disagrees where it is above zero for sure and not below 1 %."""
    if best.lmbda == 0 or negligible(best.interval) == "agrees" or best.interval.high <= 0:
        return "agrees"
    return "disagrees" if holds(best.interval) == "agrees" else "undecided"


def _cuts(lab: Lab, split: str) -> Cuts:
    lm = lab.lm()
    vocab = lm.output_embedding.shape[0]
    wanted = [m for m in lab.preset.option("sparsification.kept", KEPT) if m < vocab]
    states = lab.states(split, "ffn")
    return cut(states.keys, lm.output_embedding, lm.output_bias, states.targets, [*wanted, vocab])


def _row(kept: str, mass: float | None, m: Mixture) -> dict[str, Any]:
    return {
        "kept": kept,
        "probability kept": mass,
        "t": m.temperature if mass is None else None,
        "lmbda": m.lmbda,
        "alone": m.alone,
        "perplexity": m.mixture,
        "oracle": m.oracle,
        "change": str(Gain(m.gain, m.interval)),
        "paper's way: lmbda": m.paper["lmbda"],
        f"paper's way: per {m.paper['per']}": m.paper["mixture"],
        f"paper's way: base per {m.paper['per']}": m.paper["base"],
    }


def plot(result: dict[str, Any], axes: Any) -> None:
    """Change of perplexity by the number of tokens kept, beside the kNN's."""
    s = result["series"]
    y = [percent_change(gain) for gain in s["gain"]]
    axes.plot(s["kept"], y, "o-", color=COLORS[0], label="LM with its own output, cut")
    if s["low"][0] is not None:
        ends = [[percent_change(value) for value in s[name]] for name in ("low", "high")]
        axes.fill_between(s["kept"], *ends, color=COLORS[0], alpha=0.15, linewidth=0)
    axes.axhline(percent_change(s["knn"]), color=COLORS[1], label="LM with the kNN")
    reference_line(axes, 0.0, "LM alone")
    axes.set_xscale("log", base=2)
    dress(
        axes,
        title="The LM mixed with its own output, cut to the top entries",
        xlabel="tokens kept",
        ylabel="change of perplexity on test, %",
    )
