"""mixture-of-softmaxes: k softmaxes over one output matrix in place of the datastore (spec 2.4).

    p(w | h) = sum_i pi_i(h) softmax(W c_i)_w,   pi = softmax(Linear(h)),   c_i = Linear_i(h)

There is no tanh in the contexts. W starts as the LM's output matrix and stays, or is trained too.
One component (k = 1) is the control: what a linear layer gives without any mixing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from knnext.experiments.lab import Lab
from knnext.experiments.lab.claims import holds
from knnext.experiments.lab.examples import layer_examples
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
    settled,
    share_text,
    still_falling,
)
from knnext.experiments.lab.results import Description, Findings, PaperFigure, percent_interval
from knnext.experiments.lab.training import Schedule, Trained, trained
from knnext.experiments.lab.word_rows import even_layout, word_log_p

DESCRIPTION = Description(
    name="mixture-of-softmaxes",
    title="Mixture of softmaxes",
    question="Does a mixture of softmaxes come as far as the kNN-LM?",
    claim="More capacity of the output layer explains only part of the gain. (What the paper found "
    "with mixtures of softmaxes was not at hand; tested is that they stay behind the kNN-LM.)",
    varies="the second component: k softmaxes on att or ffn; new layers alone, or W_sm with them",
    paper=(
        PaperFigure("k = 2 to 5, att and ffn, with and without the output matrix", "code"),
        PaperFigure("more capacity recovers about half of the gain", "digest"),
        PaperFigure("the results stand in an appendix", "recalled"),
    ),
)

LAYERS = ("att", "ffn")
ALL_SOFTMAXES = (1, 2, 3, 4, 5)
#: With new layers alone, and with the output matrix, where that would take too long.
SOFTMAXES = {"tiny": ((1, 2), (1, 2)), "small": (ALL_SOFTMAXES, (1, 2, 3))}
_SEEDED = 2  # there, more components than this are trained with one seed


class MixtureOfSoftmaxes(nn.Module):
    """k softmaxes over (V, D) `output`.

    The contexts start near the state itself, where the LM's output matrix can read them, and apart
    from each other by small noise; the weights start nearly equal.
    """

    bias: Tensor | None

    def __init__(
        self,
        output: Tensor,
        bias: Tensor | None,
        components: int,
        train_output: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        dim = output.shape[1]
        noise = (
            torch.randn(
                components, dim, dim, generator=generator, dtype=torch.float32, device="cpu"
            )
            * 0.1
            * dim**-0.5
        )
        gate = (
            torch.randn(components, dim, generator=generator, dtype=torch.float32, device="cpu")
            * 0.1
            * dim**-0.5
        )
        self.contexts = nn.Parameter(torch.eye(dim, dtype=torch.float32, device="cpu") + noise)
        self.shifts = nn.Parameter(torch.zeros(components, dim, dtype=torch.float32, device="cpu"))
        self.gate, self.gate_bias = (
            nn.Parameter(gate),
            nn.Parameter(torch.zeros(components, dtype=torch.float32, device="cpu")),
        )
        self.output = nn.Parameter(output.clone(), requires_grad=train_output)
        self.register_buffer("bias", bias)
        self.layout = even_layout(output.shape[0], 1)

    def forward(self, states: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """(n,) log p of the targets."""
        (h,), components = states, self.gate.shape[0]
        weights = nn.functional.linear(h, self.gate, self.gate_bias).log_softmax(1)
        contexts = torch.einsum("nd,ked->nke", h, self.contexts) + self.shifts
        flat = contexts.flatten(0, 1)
        bias = None if self.bias is None else self.bias.expand(len(flat), -1)
        wanted = targets.repeat_interleave(components)
        log_q = word_log_p(flat, self.output, self.layout, wanted, logits=bias)
        return (weights + log_q.view(-1, components)).logsumexp(1)


@dataclass(frozen=True)
class Variant:
    """k components on one layer; whether W is trained with them."""

    key_layer: str
    components: int
    train_output: bool

    @property
    def series(self) -> str:
        """The line of the plot that this is a point of."""
        return f"{self.key_layer}, {'W trained too' if self.train_output else 'new layers'}"


def schedule(lab: Lab) -> Schedule:
    """Of every variant."""
    option = lab.preset.option
    return Schedule(
        steps=max(1, round(lab.preset.steps * option("mixture-of-softmaxes.steps", 2))),
        batch_size=option("mixture-of-softmaxes.batch_size", 256),
        learning_rate=option("mixture-of-softmaxes.learning_rate", 2e-3),
        checks=6,
    )


def variants(lab: Lab) -> list[Variant]:
    """What is trained, a line of the plot after the other."""
    frozen, with_output = SOFTMAXES.get(lab.preset.name, (ALL_SOFTMAXES, ALL_SOFTMAXES))
    frozen = lab.preset.option("mixture-of-softmaxes.components", frozen)
    with_output = lab.preset.option("mixture-of-softmaxes.with_output", with_output)
    return [
        Variant(layer, k, train_output)
        for layer in LAYERS
        for train_output, numbers in ((False, frozen), (True, with_output))
        for k in numbers
    ]


def train_variant(lab: Lab, variant: Variant, seed: int) -> Trained:
    """One variant of one seed."""
    lm = lab.lm()

    def build(generator: torch.Generator) -> MixtureOfSoftmaxes:
        output, bias = lm.output_embedding, lm.output_bias
        return MixtureOfSoftmaxes(output, bias, variant.components, variant.train_output, generator)

    settings = {
        "h_ds": variant.key_layer,
        "components": variant.components,
        "train_output": variant.train_output,
    }
    name = f"{variant.components} softmaxes on {variant.series}"
    examples = layer_examples(lab, variant.key_layer)
    return trained(lab, name, settings, build, examples, schedule(lab), seed=seed)


def run(lab: Lab) -> Findings:
    """Train every variant and hold its mixture with the LM against the kNN-LM."""
    yardstick = Yardstick(lab)
    found: list[tuple[Variant, Replacement]] = []
    rows: list[dict[str, Any]] = []
    details: dict[str, Any] = {"kNN-LM": yardstick.knn.to_dict()}
    trainings: dict[str, dict[str, Any]] = {}
    for variant in variants(lab):
        single = lab.preset.name in SOFTMAXES and variant.components > _SEEDED
        seeds = lab.preset.seeds[: 1 if single else None]
        runs = [train_variant(lab, variant, seed) for seed in seeds]
        measured = yardstick.measure([one.component for one in runs])
        name = f"{variant.series}, k = {variant.components}"
        training = trainings[name] = convergence(runs)
        found.append((variant, measured))
        first = {
            "h_ds": variant.key_layer,
            "trained": "with W" if variant.train_output else "new layers",
            "k": variant.components,
            "parameters": sum(p.numel() for p in runs[0].parameters.values()),
            "seeds": len(runs),
            "converged": training["converged"],
        }
        rows.append(measured.row(**first))
        details[name] = {**measured.to_dict(), "training": training}
    knn = yardstick.knn.row(h_ds="att", trained="kNN-LM", seeds=1)
    rows.append({name: knn.get(name) for name in rows[0]})
    return Findings(
        rows=rows,
        **_verdict(found, yardstick, trainings),
        series=_series(found, yardstick),
        details=details,
    )


def _verdict(
    found: Sequence[tuple[Variant, Replacement]],
    yardstick: Yardstick,
    trainings: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Agrees where the kNN-LM is better than the variant that is best on valid, beyond its
    interval."""
    variant, best = min(found, key=lambda pair: pair[1].valid_nll)
    same = {v.components: one for v, one in found if v.series == variant.series}
    control = same[min(same)]
    mixing = yardstick.difference(best, control)
    gained = percent_interval(best.gain - control.gain, mixing.low, mixing.high)
    text = share_text(best.share, best.share_interval)
    return {
        "agreement": settled(holds(yardstick.difference(yardstick.knn, best)), trainings),
        "words": f"The best variant on valid ({variant.series}, k = {variant.components}) recovers "
        f"{text} of the kNN-LM's gain; against k = {min(same)} of the same kind its softmaxes "
        f"change perplexity by {gained}." + still_falling(trainings),
        "headline": f"at best {text} recovered",
    }


def _series(found: Sequence[tuple[Variant, Replacement]], yardstick: Yardstick) -> dict[str, Any]:
    lines: dict[str, dict[str, list[float]]] = {}
    for variant, one in found:
        points = lines.setdefault(variant.series, {"k": [], "gain": []})
        points["k"].append(variant.components)
        points["gain"].append(one.gain)
    return {"lines": lines, "knn": yardstick.knn.gain}


def plot(result: dict[str, Any], axes: Any) -> None:
    """Gain against k, a line for each layer and choice of what is trained."""
    for name, points in result["series"]["lines"].items():
        whole = "W" in name
        style: dict[str, Any] = {"color": STATES[name[:3]], "marker": "s" if whole else "o"}
        label = name.replace("W trained too", "output matrix trained too")
        line(axes, points["k"], points["gain"], label, linestyle="--" if whole else "-", **style)
    reference_line(axes, result["series"]["knn"], "exact kNN-LM (att)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    gains = [gain for points in result["series"]["lines"].values() for gain in points["gain"]]
    axes.set_ylim(bottom=0 if all(gain > 0 for gain in gains) else None)
    dress(
        axes,
        title="Gain by the number of softmaxes",
        xlabel="number of softmaxes (1: a linear layer alone)",
        ylabel="gain in log perplexity (test),\nnats per token",
        legend=False,
    )
    legend_below(axes)
    note(axes.figure, STATES_NOTE)
