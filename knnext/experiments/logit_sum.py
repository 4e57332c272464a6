"""logit-sum: the two states fused before the softmax (spec 2.4).

    p = softmax(W_sm ffn + W_2 att)

Only W_2 is trained, from zero: it starts as the LM. The kNN-LM and the trained V x D matrix mix
probabilities after the softmax instead; the same parameters on the same state, fused elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from knnext.experiments import learned_embedding
from knnext.experiments.lab import Lab
from knnext.experiments.lab.claims import holds
from knnext.experiments.lab.examples import layer_examples
from knnext.experiments.lab.figures import GAIN_LABEL, STATES_NOTE, bars, dress, note
from knnext.experiments.lab.recovery import (
    Replacement,
    Yardstick,
    convergence,
    settled,
    share_text,
    still_falling,
)
from knnext.experiments.lab.results import Description, Findings, PaperFigure, percent_interval
from knnext.experiments.lab.training import Schedule, Trained, trained
from knnext.experiments.lab.word_rows import even_layout, word_log_p

DESCRIPTION = Description(
    name="logit-sum",
    title="Fusing before the softmax",
    question="Is it enough to add att's logits to the LM's, before the softmax?",
    claim="More capacity of the output layer explains only part of the gain. (What the paper found "
    "with a second matrix in the softmax was not at hand; tested is that it stays behind the "
    "kNN-LM.)",
    varies="where the second state comes in: logits W_sm ffn + W_2 att, W_2 trained",
    paper=(
        PaperFigure("logits W_sm ffn + W_2 att with W_2 alone trained", "code"),
        PaperFigure("more capacity recovers about half of the gain", "digest"),
        PaperFigure("the results stand in an appendix", "recalled"),
    ),
)


class LogitSum(nn.Module):
    """softmax(W_sm ffn + W_2 att), W_sm frozen; reads the states (ffn, att)."""

    output: Tensor
    bias: Tensor | None

    def __init__(self, output: Tensor, bias: Tensor | None, dim: int) -> None:
        super().__init__()
        self.register_buffer("output", output, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.second = nn.Parameter(
            torch.zeros(output.shape[0], dim, dtype=torch.float32, device="cpu")
        )
        self.layout = even_layout(output.shape[0], 1)

    def forward(self, states: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """(n,) log p of the targets."""
        ffn, att = states
        with torch.no_grad():
            logits = nn.functional.linear(ffn, self.output, self.bias)
        return word_log_p(att, self.second, self.layout, targets, logits=logits)


def schedule(lab: Lab) -> Schedule:
    """Of W_2."""
    option = lab.preset.option
    return Schedule(
        steps=max(1, round(lab.preset.steps * option("logit-sum.steps", 2))),
        batch_size=option("logit-sum.batch_size", 512),
        learning_rate=option("logit-sum.learning_rate", 3e-3),
    )


def second_matrix(lab: Lab, seed: int) -> Trained:
    """W_2 of one seed; the seed decides the order of the rows alone."""
    lm = lab.lm()

    def build(_generator: torch.Generator) -> LogitSum:
        dim = lab.states("valid", "att").keys.shape[1]
        return LogitSum(lm.output_embedding, lm.output_bias, dim)

    examples = layer_examples(lab, "ffn", "att")
    return trained(lab, "W_2 on att", {"sum": "logits"}, build, examples, schedule(lab), seed=seed)


def run(lab: Lab) -> Findings:
    """Train W_2 and compare sum, sum mixed with the LM, V x D mixed with the LM, and kNN-LM."""
    yardstick = Yardstick(lab)
    runs = [second_matrix(lab, seed) for seed in lab.preset.seeds]
    rivals = [learned_embedding.embedding(lab, "att", seed) for seed in lab.preset.seeds]
    alone = yardstick.measure([one.component for one in runs], lmbda=1)
    mixed = yardstick.measure([one.component for one in runs])
    probabilities = yardstick.measure([one.component for one in rivals])
    shown = {
        "kNN-LM, att": yardstick.knn,
        "logit sum, mixed with the LM": mixed,
        "logit sum alone": alone,
        "V x D on att, mixed with the LM": probabilities,
    }
    trainings = {"logit sum": convergence(runs), "V x D": convergence(rivals)}
    return Findings(
        rows=[one.row(system=name) for name, one in shown.items()],
        agreement=settled(holds(yardstick.difference(yardstick.knn, mixed)), trainings),
        words=_words(yardstick, alone, mixed, probabilities) + still_falling(trainings),
        headline=share_text(mixed.share, mixed.share_interval) + " recovered",
        series={
            "labels": list(shown),
            "gain": [one.gain for one in shown.values()],
            "low": [one.interval.low for one in shown.values()],
            "high": [one.interval.high for one in shown.values()],
        },
        details={
            **{name: one.to_dict() for name, one in shown.items()},
            "training": trainings,
        },
    )


def _words(
    yardstick: Yardstick, alone: Replacement, mixed: Replacement, probabilities: Replacement
) -> str:
    spread = yardstick.difference(alone, probabilities)
    against = percent_interval(alone.gain - probabilities.gain, spread.low, spread.high)
    return (
        f"The summed logits recover {share_text(alone.share, alone.share_interval)} of the "
        f"kNN-LM's gain alone and {share_text(mixed.share, mixed.share_interval)} mixed with the "
        f"LM. Against a matrix of the same size on att whose probabilities are mixed with the "
        f"LM's, perplexity changes by {against}."
    )


def plot(result: dict[str, Any], axes: Any) -> None:
    """Gains as bars, with their intervals."""
    series = result["series"]
    axes.figure.set_size_inches(8.2, 3.6)
    spans = list(zip(series["low"], series["high"], strict=True))
    labels = [label.replace("V x D", "trained matrix") for label in series["labels"]]
    bars(axes, labels, series["gain"], spans, good=1, digits=2, standard=labels[0])
    dress(
        axes,
        title="A trained matrix on the att states, before or after the softmax",
        xlabel=GAIN_LABEL,
        ylabel="",
    )
    note(axes.figure, f"{STATES_NOTE} The matrix has a row a word.")
