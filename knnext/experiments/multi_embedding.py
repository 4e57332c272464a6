"""multi-embedding: n trained vectors a word, whose probabilities are summed (spec 2.4).

W_ds has nV rows (special tokens keep one), the softmax runs over all of them, and M sums the rows
of a word. Does the kNN-LM gain by its capacity? Then more rows a word should come closer to it.
Uneven allocations give the same number of rows in all, more to words that are frequent, or on
which the LM loses much: 1 + floor(log_b(x)) rows with b such that the total is as wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knnext.experiments import learned_embedding
from knnext.experiments.lab import Lab
from knnext.experiments.lab.claims import holds, together
from knnext.experiments.lab.examples import train_log_p_lm
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.figures import (
    STATES,
    STATES_NOTE,
    dress,
    legend_below,
    line,
    note,
    reference_line,
)
from knnext.experiments.lab.recovery import (
    Replacement,
    Yardstick,
    convergence,
    share_text,
    still_falling,
)
from knnext.experiments.lab.results import Agreement, Description, Findings, PaperFigure
from knnext.experiments.lab.training import Schedule
from knnext.experiments.lab.word_rows import PUBLISHED_FLOOR, Layout, even_layout, trained_rows

DESCRIPTION = Description(
    name="multi-embedding",
    title="Several trained vectors a word",
    question="Do more trained vectors a word come closer to the kNN-LM?",
    claim="A few vectors a word recover only about half of the kNN-LM's gain, more of them do not "
    "keep helping, and on ffn they barely help.",
    varies="W_ds: nV trained rows; h_ds att and ffn; rows a word even, by frequency, by loss",
    paper=(
        PaperFigure("a few vectors a word recover about half of the gain", "digest"),
        PaperFigure("ffn barely benefits, att is inconsistent", "digest"),
        PaperFigure("n = 1 to 9; uneven: 3V and 5V rows in all", "code"),
    ),
)

LAYERS = ("att", "ffn")
#: Rows a word. On two cores all nine would take half an hour.
ROWS = {"tiny": (1, 3), "small": (1, 2, 3, 6)}
ALL_ROWS = tuple(range(1, 10))
#: More rows a word than this are trained with the first seed alone, but on a GPU.
_SEEDED_ROWS = 2
_HALF = (0.35, 0.7)


@dataclass(frozen=True)
class Variant:
    """One allocation of rows on one layer: `rows` a word on average, `by` what they are given."""

    key_layer: str
    rows: int
    by: str
    layout: Layout

    @property
    def name(self) -> str:
        return f"{self.key_layer}, {self.rows} a word" + (
            "" if self.by == "even" else f" {self.by}"
        )


def schedule(lab: Lab) -> Schedule:
    """Of every variant, so that they differ in their rows alone."""
    option = lab.preset.option
    return Schedule(
        steps=max(1, round(lab.preset.steps * option("multi-embedding.steps", 3))),
        batch_size=option("multi-embedding.batch_size", 512),
        learning_rate=option("multi-embedding.learning_rate", 5e-3),
        checks=6,
    )


def variants(lab: Lab) -> list[Variant]:
    """What is trained, in order: even ones by layer and n, then the uneven ones on att."""
    option, name = lab.preset.option, lab.preset.name
    vocab_size = lab.lm().output_embedding.shape[0]
    special = tuple(i for i in lab.tokenizer.all_special_ids if i < vocab_size)
    numbers = option("multi-embedding.rows", ROWS.get(name, ALL_ROWS))
    found = [
        Variant(layer, n, "even", even_layout(vocab_size, n, special))
        for layer in LAYERS
        for n in numbers
    ]
    for rows in option("multi-embedding.uneven", (3,) if name in ROWS else (3, 5)):
        for by, weights in word_weights(lab, vocab_size).items():
            counts = uneven_counts(weights, rows * vocab_size, special)
            found.append(Variant("att", rows, by, Layout(counts)))
    return found


def word_weights(lab: Lab, vocab_size: int) -> dict[str, Tensor]:
    """(V,) float64: frequency of each word in the datastore; 1 + its total loss there."""
    targets = lab.train_states("att").targets
    loss = torch.zeros(vocab_size, dtype=torch.float64, device="cpu")
    loss.index_add_(0, targets, -train_log_p_lm(lab).double())
    return {
        "by frequency": targets.bincount(minlength=vocab_size).double(),
        "by loss": 1 + loss,
    }


def uneven_counts(weights: Tensor, total: int, special: Sequence[int] = ()) -> Tensor:
    """(V,) int64 rows a word: 1 + floor(log_b(weight)), b the smallest with at most `total` rows.

    A word of weight under b has one row, as have the special ones.
    """
    logs = weights.double().clamp_min(1).log()
    logs[list(special)] = 0

    def counts(log_base: float) -> Tensor:
        return 1 + (logs / log_base + 1e-12).floor().long()

    low, high = 1e-3, max(1.0, float(logs.max())) * 2  # of log b: too many rows, one a word
    if total < len(weights):
        raise ValueError(f"total must be at least one row a word, {len(weights)}, got {total}")
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if int(counts(middle).sum()) <= total else (middle, high)
    return counts(high)


def run(lab: Lab) -> Findings:
    """Train every variant, mix each with the LM, and hold gains against rows a word."""
    yardstick = Yardstick(lab)
    found: list[tuple[Variant, Replacement]] = []
    rows: list[dict[str, Any]] = []
    details: dict[str, Any] = {"kNN-LM": yardstick.knn.to_dict()}
    trainings: dict[str, dict[str, Any]] = {}
    for variant in variants(lab):
        few = lab.preset.name in ROWS and variant.rows > _SEEDED_ROWS
        seeds = lab.preset.seeds[: 1 if few else None]
        runs = [
            trained_rows(
                lab,
                variant.key_layer,
                variant.layout,
                schedule(lab),
                seed=seed,
                floor=PUBLISHED_FLOOR,
            )
            for seed in seeds
        ]
        measured = yardstick.measure([one.component for one in runs])
        training = trainings[variant.name] = convergence(runs)
        found.append((variant, measured))
        rows.append(
            measured.row(
                h_ds=variant.key_layer,
                allocation=variant.by,
                rows=variant.layout.num_rows,
                seeds=len(runs),
                converged=training["converged"],
            )
        )
        details[variant.name] = {
            "setting": Setting("multi-embedding", variant.key_layer, "ip", "none").to_dict(),
            **measured.to_dict(),
            "training": training,
        }
    longer = _longer(lab, yardstick)
    for layer, one in longer.items():
        steps = f"even, {learned_embedding.schedule(lab).steps:,} steps"
        row = one.row(
            h_ds=layer, allocation=steps, rows=lab.lm().output_embedding.shape[0], seeds=1
        )
        rows.append({name: row.get(name) for name in rows[0]})
    knn = yardstick.knn.row(h_ds="att", allocation="kNN-LM", rows=len(lab.store()), seeds=1)
    rows.append({name: knn.get(name) for name in rows[0]})
    return Findings(
        rows=rows,
        **_verdict(found, yardstick, _length(lab, longer) + still_falling(trainings)),
        series=_series(found, yardstick),
        details=details,
    )


def _longer(lab: Lab, yardstick: Yardstick) -> dict[str, Replacement]:
    """One row a word by layer, trained as long as learned-embedding does: what length alone gives.

    Where training is short more rows also learn faster, and their gain is not of capacity alone.
    """
    seed = lab.preset.seeds[0]
    return {
        layer: yardstick.measure([learned_embedding.embedding(lab, layer, seed).component])
        for layer in LAYERS
    }


def _length(lab: Lab, longer: dict[str, Replacement]) -> str:
    gains = ", ".join(f"{layer} {one.gain:.3f}" for layer, one in longer.items())
    steps, more = schedule(lab).steps, learned_embedding.schedule(lab).steps
    return f" One row a word trained for {more:,} steps in place of {steps:,} gives {gains}."


def _verdict(
    found: Sequence[tuple[Variant, Replacement]], yardstick: Yardstick, unsettled: str
) -> dict[str, Any]:
    even = {(v.key_layer, v.rows): one for v, one in found if v.by == "even"}
    few, most = min(n for _, n in even), max(n for _, n in even)
    on_att = [n for layer, n in even if layer == "att"]
    best = min(on_att, key=lambda n: even["att", n].valid_nll)
    att, ffn = even["att", best], even["ffn", most]
    steps = {layer: yardstick.difference(even[layer, most], even[layer, few]) for layer in LAYERS}
    agreement = judge(att, [steps[layer] for layer in LAYERS], yardstick.knn)
    text = share_text(att.share, att.share_interval)
    gains = ", ".join(
        f"{layer} {even[layer, few].gain:.3f} to {even[layer, most].gain:.3f}" for layer in LAYERS
    )
    return {
        "agreement": agreement,
        "words": f"The best on att ({best} a word, chosen on valid) recovers {text} of the "
        f"kNN-LM's gain, {most} a word on ffn {share_text(ffn.share, ffn.share_interval)}. "
        f"From {few} to {most} rows a word the gain in log perplexity went: {gains}." + unsettled,
        "headline": f"{text} recovered by {best} a word (att)",
    }


def judge(best: Replacement, steps: Sequence[Any], knn: Replacement) -> Agreement:
    """Of two parts: about half (35 to 70 %) is recovered; many rows a word are no better than one.

    `steps`: intervals of the gain by many rows over few, for each layer; the second part fails
    where one lies above zero.
    """
    if not knn.interval.low > 0:
        return "undecided"
    half: Agreement = "agrees" if _HALF[0] <= best.share <= _HALF[1] else "disagrees"
    more = ["disagrees" if holds(step) == "agrees" else "agrees" for step in steps]
    return together(half, "disagrees" if "disagrees" in more else "agrees")


def _series(found: Sequence[tuple[Variant, Replacement]], yardstick: Yardstick) -> dict[str, Any]:
    points = [
        {
            "layer": v.key_layer,
            "by": v.by,
            "rows": v.layout.num_rows / len(v.layout.counts),
            "gain": one.gain,
            "low": one.interval.low,
            "high": one.interval.high,
        }
        for v, one in found
    ]
    return {"points": points, "knn": yardstick.knn.gain}


def plot(result: dict[str, Any], axes: Any) -> None:
    """Gain against rows a word, a line a layer, the uneven allocations as single marks."""
    points = result["series"]["points"]
    for number, layer in enumerate(LAYERS):
        own = [p for p in points if p["layer"] == layer and p["by"] == "even"]
        x, y = [p["rows"] for p in own], [p["gain"] for p in own]
        line(axes, x, y, f"{layer}, as many for every word", number, color=STATES[layer])
        low, high = [p["low"] for p in own], [p["high"] for p in own]
        if None not in low + high:
            axes.fill_between(x, low, high, color=STATES[layer], alpha=0.12, linewidth=0)
    for number, by in enumerate(("by frequency", "by loss"), 2):
        own = [p for p in points if p["by"] == by]
        label = f"att, more for words {'of high frequency' if number == 2 else 'of high loss'}"
        style = {"linestyle": "none", "color": STATES["att"], "markerfacecolor": "white"}
        line(axes, [p["rows"] for p in own], [p["gain"] for p in own], label, number, **style)
    reference_line(axes, result["series"]["knn"], "exact kNN-LM (att)")
    axes.set_ylim(bottom=0 if all(p["gain"] > 0 for p in points) else None)
    dress(
        axes,
        title="Gain by the number of trained rows a word",
        xlabel="rows a word, on average",
        ylabel="gain in log perplexity (test),\nnats per token",
        legend=False,
    )
    legend_below(axes)
    note(axes.figure, f"{STATES_NOTE} Bands: 95 % intervals over documents.")
