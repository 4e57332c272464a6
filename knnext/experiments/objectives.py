"""objectives: W_ds trained for the mixture, or for what the kNN is good at (spec 2.12).

interpolated: -log[(1 - lmbda) P_LM + lmbda P_ds] with lmbda 0.25; P_LM is the frozen LM's, from its
output matrix on the stored ffn states, so the gradient passes through P_ds alone.

weighted: cross-entropy in which word w counts 1 + (share of its occurrences in training at which
the kNN gives it more than the LM). The kNN of a training row is searched without the row itself,
which is excluded by its number; a sample of rows stands for all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from knnext.experiments import multi_embedding
from knnext.experiments.lab import Lab
from knnext.experiments.lab.claims import holds
from knnext.experiments.lab.examples import Examples, layer_examples, train_log_p_lm
from knnext.experiments.lab.figures import (
    GAIN_LABEL,
    MUTED,
    STATES_NOTE,
    bars,
    dress,
    legend_below,
    note,
)
from knnext.experiments.lab.leave_one_out import row_neighbors
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
from knnext.experiments.lab.training import Trained, nll
from knnext.experiments.lab.word_rows import PUBLISHED_FLOOR, even_layout, trained_rows
from knnext.ops import knn_target_log_prob

DESCRIPTION = Description(
    name="objectives",
    title="Other training objectives",
    question="Does a trained W_ds come closer to the kNN-LM with a loss made for the mixture?",
    claim="Neither a loss of the mixture nor weights for words on which the kNN helps make up for "
    "the datastore.",
    varies="the loss of W_ds: cross-entropy, interpolated, weighted; n rows a word; att and ffn",
    paper=(
        PaperFigure("ruled out as the reason of the gain", "digest"),
        PaperFigure("interpolated with lmbda 0.25, n = 1 and 3", "code"),
        PaperFigure("the kNN beats the LM on 29.2 % of the training tokens", "code"),
    ),
)

LMBDA = 0.25
LAYERS = ("att", "ffn")
_FEW = ("tiny", "small")  # presets in which three rows a word are trained with one seed


def interpolated(log_p: Tensor, examples: Examples) -> Tensor:
    """Mean -log[(1 - lmbda) P_LM + lmbda P_ds]; `examples.extra["log_p_lm"]` is P_LM's."""
    lm = examples.extra["log_p_lm"].to(log_p.dtype)
    return -torch.logaddexp(lm + math.log1p(-LMBDA), log_p + math.log(LMBDA)).mean()


def weighted(log_p: Tensor, examples: Examples) -> Tensor:
    """Cross-entropy with `examples.extra["weight"]`, over the sum of the weights."""
    weight = examples.extra["weight"].to(log_p.dtype)
    return -(weight * log_p).sum() / weight.sum()


def class_weights(wins: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """(V,) float32: 1 + each word's share of `wins` (n,) bool among its targets (n,).

    A word that was not sampled gets the share of all.
    """
    seen = targets.bincount(minlength=vocab_size).double()
    won = targets[wins].bincount(minlength=vocab_size).double()
    share = torch.where(seen > 0, won / seen.clamp_min(1), wins.double().mean())
    return (1 + share).float()


def knn_wins(lab: Lab, yardstick: Yardstick) -> tuple[Tensor, Tensor]:
    """(n,) bool, whether the kNN gives a sampled row's target more than the LM; (n,) the targets.

    The temperature is the one that suits the valid split.
    """
    train = lab.train_states("att")
    count = len(train.targets)
    sample = min(count, lab.preset.option("objectives.sample", max(8192, count // 100)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")
    rows = order[:sample].sort().values
    near = row_neighbors(lab, rows, lab.preset.k, yardstick.setting)
    targets = train.targets[rows]
    log_p = knn_target_log_prob(near.distances, near.tokens, targets, yardstick.temperature)
    return log_p > train_log_p_lm(lab)[rows], targets


def with_extra(
    lab: Lab, key_layer: str, extra: Callable[[str, Examples], dict[str, Tensor]]
) -> Callable[[str], Examples]:
    """The examples of a layer with what a loss reads besides."""
    plain = layer_examples(lab, key_layer)

    def examples(split: str) -> Examples:
        found = plain(split)
        return replace(found, extra=extra(split, found))

    return examples


class Objectives:
    """Trains W_ds by each objective, all else being equal and shared with multi-embedding."""

    def __init__(self, lab: Lab, yardstick: Yardstick) -> None:
        self.lab = lab
        self.vocab_size = lab.lm().output_embedding.shape[0]
        wins, targets = knn_wins(lab, yardstick)
        self.weights = class_weights(wins, targets, self.vocab_size)
        self.sampled, self.win_share = len(wins), float(wins.double().mean())
        # For the key: the wins, and so the weights, are those of k neighbors at a temperature.
        self.knn = f"{lab.preset.k} neighbors at t = {yardstick.temperature:.6g}"

    def train(self, objective: str, key_layer: str, rows: int, seed: int) -> Trained:
        """One matrix of `rows` rows a word."""
        loss, extra, name = {
            "cross-entropy": (nll, lambda _split, _found: {}, "cross-entropy"),
            "interpolated": (interpolated, self._log_p_lm, f"interpolated {LMBDA}"),
            "weighted": (weighted, self._weight, f"weighted by {self.sampled} rows, {self.knn}"),
        }[objective]
        special = tuple(i for i in self.lab.tokenizer.all_special_ids if i < self.vocab_size)
        return trained_rows(
            self.lab,
            key_layer,
            even_layout(self.vocab_size, rows, special),
            multi_embedding.schedule(self.lab),
            seed=seed,
            floor=PUBLISHED_FLOOR,
            objective=name,
            loss=loss,
            examples=with_extra(self.lab, key_layer, extra),
        )

    def _log_p_lm(self, split: str, _found: Examples) -> dict[str, Tensor]:
        if split == "train":
            return {"log_p_lm": train_log_p_lm(self.lab)}
        return {"log_p_lm": self.lab.split(split).log_p_lm}

    def _weight(self, _split: str, found: Examples) -> dict[str, Tensor]:
        return {"weight": self.weights[found.targets]}


def run(lab: Lab) -> Findings:
    """Train by every objective, mix with the LM, and hold each against plain cross-entropy."""
    yardstick = Yardstick(lab)
    objectives = Objectives(lab, yardstick)
    found: dict[tuple[str, int, str], Replacement] = {}
    rows, details = [], {"kNN-LM": yardstick.knn.to_dict()}
    trainings: dict[str, dict[str, Any]] = {}
    for layer, number, name in plan(lab):
        few = lab.preset.name in _FEW and number > 1
        seeds = lab.preset.seeds[: 1 if few else None]
        runs = [objectives.train(name, layer, number, seed) for seed in seeds]
        one = found[layer, number, name] = yardstick.measure([r.component for r in runs])
        label = f"{name}, {layer}, n = {number}"
        training = trainings[label] = convergence(runs)
        first = {"objective": name, "h_ds": layer, "rows a word": number, "seeds": len(seeds)}
        against = _against(yardstick, one, found[layer, number, "cross-entropy"])
        rows.append(
            one.row(**first, **{"against cross-entropy": against[0]})
            | {"converged": training["converged"]}
        )
        details[label] = {**one.to_dict(), "training": training}
    details["leave one out"] = {"rows": objectives.sampled, "knn wins": objectives.win_share}
    knn = yardstick.knn.row(objective="kNN-LM", h_ds="att", seeds=1)
    rows.append({name: knn.get(name) for name in rows[0]})
    return Findings(
        rows=rows,
        agreement=settled(judge(yardstick, found), trainings),
        **_words(yardstick, found, objectives, still_falling(trainings)),
        series={
            "labels": [f"{name}, {layer}, n = {n}" for layer, n, name in found],
            "gain": [one.gain for one in found.values()],
            "low": [one.interval.low for one in found.values()],
            "high": [one.interval.high for one in found.values()],
            "knn": yardstick.knn.gain,
        },
        details=details,
    )


def plan(lab: Lab) -> list[tuple[str, int, str]]:
    """(layer, rows a word, objective), cross-entropy first of each."""
    numbers = lab.preset.option("objectives.rows", (1, 3))
    return [
        (layer, n, name)
        for layer in LAYERS
        for n in numbers
        for name in ("cross-entropy", "interpolated", "weighted")
        if n == 1 or name != "weighted"
    ]


def judge(yardstick: Yardstick, found: dict[tuple[str, int, str], Replacement]) -> Agreement:
    """Agrees where the kNN-LM is better than every other objective beyond the interval; in part
    where one objective's difference to it is open; disagrees where one is better."""
    verdicts = {
        holds(yardstick.difference(yardstick.knn, one))
        for (_, _, name), one in found.items()
        if name != "cross-entropy"
    }
    if "disagrees" in verdicts:
        return "disagrees"
    if verdicts == {"agrees"}:
        return "agrees"
    return "agrees in part" if "agrees" in verdicts else "undecided"


def _against(
    yardstick: Yardstick, one: Replacement, plain: Replacement
) -> tuple[str, float, float]:
    if one is plain:
        return "–", 0.0, 0.0
    spread = yardstick.difference(one, plain)
    return percent_interval(one.gain - plain.gain, spread.low, spread.high), spread.low, spread.high


def _words(
    yardstick: Yardstick,
    found: dict[tuple[str, int, str], Replacement],
    objectives: Objectives,
    unsettled: str,
) -> dict[str, str]:
    others = {key: one for key, one in found.items() if key[2] != "cross-entropy"}
    (layer, number, name), best = min(others.items(), key=lambda item: item[1].valid_nll)
    plain = found[layer, number, "cross-entropy"]
    change = _against(yardstick, best, plain)[0]
    text = share_text(best.share, best.share_interval)
    return {
        "words": f"The best of the other objectives on valid ({name}, {layer}, n = {number}) "
        f"recovers {text} of the kNN-LM's gain, plain cross-entropy of the same size "
        f"{share_text(plain.share, plain.share_interval)}: a change of perplexity by {change}. "
        f"Without the row itself the kNN beats the LM on {100 * objectives.win_share:.1f} % of "
        f"{objectives.sampled:,} rows of the datastore." + unsettled,
        "headline": f"at best {text} recovered ({name})",
    }


def plot(result: dict[str, Any], axes: Any) -> None:
    """Gains as bars with their intervals, and the kNN-LM's as a line."""
    series = result["series"]
    axes.figure.set_size_inches(8.2, 4.8)
    spans = list(zip(series["low"], series["high"], strict=True))
    labels = [_rows_in_words(label) for label in series["labels"]]
    bars(axes, labels, series["gain"], spans, good=1, digits=2)
    axes.axvline(series["knn"], color=MUTED, linewidth=1.0, linestyle="--", label="exact kNN-LM")
    dress(
        axes,
        title="Gain of trained rows by their objective",
        xlabel=GAIN_LABEL,
        ylabel="",
        legend=False,
    )
    legend_below(axes)
    note(axes.figure, STATES_NOTE)


def _rows_in_words(label: str) -> str:
    """`att, n = 3` as it is said."""
    return re.sub(r"n = (\d+)", lambda m: f"{m[1]} row{'s' * (m[1] != '1')} a word", label)
