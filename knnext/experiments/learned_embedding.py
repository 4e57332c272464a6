"""learned-embedding: the datastore replaced by one trained vector a word (spec 2.2).

W_ds is V x D, mask_k is dropped, the product is the inner product, M the identity. The LM is
frozen; see `knnext.experiments.lab.training` for how W_ds is trained.
"""

from __future__ import annotations

from typing import Any

from knnext.experiments.lab import Lab
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.figures import GAIN_LABEL, STATES_NOTE, bars, dress, note
from knnext.experiments.lab.recovery import (
    Replacement,
    Yardstick,
    convergence,
    settled,
    share_text,
    still_falling,
)
from knnext.experiments.lab.results import (
    Agreement,
    Description,
    Findings,
    PaperFigure,
    percent_interval,
)
from knnext.experiments.lab.training import Schedule, Trained
from knnext.experiments.lab.word_rows import even_layout, trained_rows

DESCRIPTION = Description(
    name="learned-embedding",
    title="Trained V x D embedding",
    question="How much of the kNN-LM's gain does one trained vector a word recover?",
    claim="A freshly trained V x D matrix on the att states, mixed with the frozen LM, recovers "
    "about 55 % of the kNN-LM's gain.",
    varies="W_ds: V trained rows in place of the datastore; h_ds att and ffn; no mask; the LM "
    "frozen with its dropout off (the authors left it on)",
    paper=(
        PaperFigure("V x D with att recovers about 55 % of the gain", "digest"),
        PaperFigure("base 21.75, with kNN-LM 19.17 at lmbda 0.263", "code"),
        PaperFigure("att: 22.58 alone, 20.35 mixed; ffn: 20.92 alone, 20.69 mixed", "recalled"),
    ),
)

LAYERS = ("att", "ffn")
CLAIMED, ABOUT = 0.55, 0.15


def schedule(lab: Lab) -> Schedule:
    """Of V x D matrices; other experiments that want the same matrices ask with it."""
    option = lab.preset.option
    return Schedule(
        steps=max(1, round(lab.preset.steps * option("learned-embedding.steps", 4))),
        batch_size=option("learned-embedding.batch_size", 512),
        learning_rate=option("learned-embedding.learning_rate", 5e-3),
    )


def embedding(lab: Lab, key_layer: str, seed: int) -> Trained:
    """The V x D matrix of one layer and seed."""
    layout = even_layout(lab.lm().output_embedding.shape[0], 1)
    return trained_rows(lab, key_layer, layout, schedule(lab), seed=seed)


def run(lab: Lab) -> Findings:
    """Train both layers for every seed, mix each with the LM, compare with the kNN-LM."""
    yardstick = Yardstick(lab)
    knn = yardstick.setting
    rows = [yardstick.knn.row(component=f"kNN-LM, {knn.h_ds}", rows=len(lab.store(knn.h_ds)))]
    found: dict[str, Replacement] = {}
    trainings: dict[str, dict[str, Any]] = {}
    details: dict[str, Any] = {"kNN-LM": {"setting": knn.to_dict(), **yardstick.knn.to_dict()}}
    vocab_size = lab.lm().output_embedding.shape[0]
    for layer in LAYERS:
        runs = [embedding(lab, layer, seed) for seed in lab.preset.seeds]
        found[layer] = yardstick.measure([one.component for one in runs])
        rows.append(found[layer].row(component=f"trained V x D, {layer}", rows=vocab_size))
        trainings[layer] = convergence(runs)
        details[layer] = {
            "setting": Setting("embedding", layer, "ip", "none").to_dict(),
            **found[layer].to_dict(),
            "training": trainings[layer],
        }
    shown = {"kNN-LM, att": yardstick.knn, **{f"V x D, {n}": one for n, one in found.items()}}
    att, ffn = found["att"], found["ffn"]
    spread = yardstick.difference(att, ffn)
    against = percent_interval(att.gain - ffn.gain, spread.low, spread.high)
    return Findings(
        rows=rows,
        agreement=settled(judge(att, yardstick.knn), trainings),
        words=f"Mixed with the LM, the trained matrix on att recovers "
        f"{share_text(att.share, att.share_interval)} of the kNN-LM's gain in log perplexity "
        f"(by perplexity per word, tuned on test: {100 * att.paper_share:.0f} %), on ffn "
        f"{share_text(ffn.share, ffn.share_interval)}; att instead of ffn changes perplexity by "
        f"{against}. Alone it stands at {att.mean('alone'):.1f} "
        f"on att and {ffn.mean('alone'):.1f} on ffn, the base LM at {yardstick.base:.1f}."
        + still_falling(trainings),
        headline=share_text(att.share, att.share_interval) + " recovered (att)",
        series={
            "labels": list(shown),
            "gain": [one.gain for one in shown.values()],
            "low": [one.interval.low for one in shown.values()],
            "high": [one.interval.high for one in shown.values()],
        },
        details=details,
    )


def judge(att: Replacement, knn: Replacement) -> Agreement:
    """Agrees where the share is 55 % give or take 15 points, in part where it is another part of
    the gain (its interval above 0 and below 1), disagrees where it is nothing or everything.

    Undecided where the kNN-LM has no gain to share, or where about 55 % may as well be nothing.
    """
    if not knn.interval.low > 0:
        return "undecided"
    if abs(att.share - CLAIMED) <= ABOUT:
        return "agrees" if att.share_interval.low > 0 else "undecided"
    inside = att.share_interval.low > 0 and att.share_interval.high < 1
    return "agrees in part" if inside else "disagrees"


def plot(result: dict[str, Any], axes: Any) -> None:
    """Gains as bars, with their intervals."""
    series = result["series"]
    axes.figure.set_size_inches(8.2, 3.6)
    spans = list(zip(series["low"], series["high"], strict=True))
    labels = [label.replace("V x D", "trained matrix") for label in series["labels"]]
    bars(axes, labels, series["gain"], spans, good=1, digits=2, standard=labels[0])
    dress(
        axes,
        title="What a trained matrix recovers of the kNN-LM's gain",
        xlabel=GAIN_LABEL,
        ylabel="",
    )
    note(axes.figure, f"{STATES_NOTE} The matrix has a row a word.")
