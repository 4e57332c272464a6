"""Is an output embedding inside the hull of the others, so that its word is never the argmax?

The kNN-LM could then win by giving such words back. The test is shown to have power on the LM's
own matrix: with rows planted inside its hull, and cut to its first principal components, where
words must steal from each other.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from knnext.experiments.lab import Lab, figures
from knnext.experiments.lab.argmax_classes import STAGES, Settled, settle_classes
from knnext.experiments.lab.results import Agreement, Description, Findings, PaperFigure
from knnext.progress import progress

DESCRIPTION = Description(
    name="stolen-probabilities",
    title="Stolen probabilities",
    question="Is any output embedding inside the convex hull of the others?",
    claim="None is: every word can be the argmax, so this is not what the neighbors mend.",
    varies="nothing: it looks at W_sm alone (every x, not only states that a text can cause)",
    paper=(
        PaperFigure("no stolen word in this model's matrix nor in Khandelwal et al.'s", "digest"),
    ),
)

_DIMENSIONS = (2, 4, 8, 16, 32)
_SAMPLE, _PLANTED, _EXACT, _STEPS = 96, 8, 8, 100
_CHUNK = 16_384


def run(lab: Lab) -> Findings:
    """All classes of the LM, planted ones, and samples in fewer dimensions."""
    lm = lab.lm()
    weight, bias = lm.output_embedding.double(), lm.output_bias
    option = lab.preset.option
    steps = option("stolen-probabilities.reflections", _STEPS)
    sample = option("stolen-probabilities.sample", _SAMPLE)
    exact = option("stolen-probabilities.exact", _EXACT)
    whole = "the LM's W"
    rows = [_row(lab, whole, weight, bias, None, steps)]
    rows.append(_row(lab, f"{whole}, linear program only", weight, bias, exact, 0, guesses=False))
    rows.append(_planted_row(lab, weight, bias, steps))
    _, _, axes = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
    for dim in _DIMENSIONS:
        if dim < weight.shape[1]:
            name = f"first {dim} components"
            rows.append(_row(lab, name, weight @ axes[:dim].T, bias, sample, steps))
    return _findings(rows, _argmax_on_data(lab, weight, bias), weight.shape[1])


def _row(
    lab: Lab,
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    sample: int | None,
    steps: int,
    *,
    guesses: bool = True,
    classes: Tensor | None = None,
) -> dict[str, Any]:
    """One matrix's row of the table; `sample` classes drawn with seed 0, or all."""
    if classes is None:
        order = torch.randperm(
            len(weight), generator=torch.Generator().manual_seed(0), device="cpu"
        )
        classes = order[:sample].sort().values
    start = time.perf_counter()
    with progress(None, f"linear programs: {name}", unit="classes") as bar:
        settled = settle_classes(
            weight, bias, classes, steps=steps, guesses=guesses, tick=lambda: bar.update(1)
        )
    return {
        "matrix": name,
        "dimensions": weight.shape[1],
        "classes": len(weight),
        "tested": len(classes),
        **_counts(settled),
        "seconds": time.perf_counter() - start,
    }


def _counts(settled: Settled) -> dict[str, int]:
    names = {"embedding": "x = W_i", "centred": "x = W_i - mean"}
    counts = {names.get(stage, stage): settled.count(stage) for stage in STAGES}
    return {**counts, "proven in the hull": settled.proven}


def _planted_row(lab: Lab, weight: Tensor, bias: Tensor | None, steps: int) -> dict[str, Any]:
    """The LM's matrix with rows added that are means of others, and so are stolen."""
    count = lab.preset.option("stolen-probabilities.planted", _PLANTED)
    generator = torch.Generator().manual_seed(0)
    spanned = torch.stack(
        [torch.randperm(len(weight), generator=generator, device="cpu")[:50] for _ in range(count)]
    )
    shares = torch.rand(count, 50, generator=generator, dtype=torch.float64, device="cpu") + 0.01
    shares /= shares.sum(1, keepdim=True)
    inner = (shares[:, :, None] * weight[spanned]).sum(1)
    if bias is not None:  # a mean of rows is stolen only with a bias no higher than their mean
        bias = torch.cat([bias.double(), (shares * bias.double()[spanned]).sum(1)])
    planted = torch.arange(len(weight), len(weight) + count, device="cpu")
    both = torch.cat([weight, inner])
    return _row(lab, "planted in the LM's W", both, bias, None, steps, classes=planted)


def _argmax_on_data(lab: Lab, weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """How often each class is the LM's first choice, over the rows of the datastore."""
    states = lab.train_states("ffn")
    with lab.step(f"take the argmax at {len(states.targets):,} states"):
        float_weight = weight.float()
        parts = []
        for part in states.keys.split(_CHUNK):
            logits = part.float() @ float_weight.T
            parts.append((logits if bias is None else logits + bias).argmax(1))
    best = torch.cat(parts)
    chosen = best.bincount(minlength=len(weight))
    targets = states.targets.bincount(minlength=len(weight))
    return {
        "states": len(states.targets),
        "argmax is the target": float((best == states.targets).double().mean()),
        "ever the argmax": int((chosen > 0).sum()),
        "ever the target": int((targets > 0).sum()),
        "target but never the argmax": int(((chosen == 0) & (targets > 0)).sum()),
        "share of targets that are never the argmax": float(targets[chosen == 0].sum())
        / len(states.targets),
        "argmax counts": chosen.tolist(),
        "target counts": targets.tolist(),
    }


def _findings(rows: list[dict[str, Any]], data: dict[str, Any], dim: int) -> Findings:
    whole, _, planted, *cut = rows
    stolen, tested = whole["stolen"], whole["tested"]
    words = (
        f"{stolen} of {tested} words are stolen in {dim} dimensions; the test finds "
        f"{planted['stolen']} of {planted['tested']} planted in the same matrix. On "
        f"{data['states']:,} states of the training text {data['ever the argmax']} words are ever "
        f"the argmax and {data['ever the target']} ever the target: the others could be, and are "
        "not."
    )
    series = {
        "dimensions": [row["dimensions"] for row in [*cut, whole]],
        "stolen share": [row["stolen"] / max(1, row["tested"]) for row in [*cut, whole]],
        "tested": [row["tested"] for row in [*cut, whole]],
        "guessed share": [
            1 - (row["stolen"] + row["open"] + row["linear program"]) / max(1, row["tested"])
            for row in [*cut, whole]
        ],
    }
    headline = f"{stolen} of {tested} words stolen"
    return Findings(rows, agreement(whole, planted), words, headline, series, {"data": data})


def agreement(whole: dict[str, Any], planted: dict[str, Any]) -> Agreement:
    """None stolen agrees, if the test found every planted word and left nothing open."""
    if whole["stolen"]:
        return "disagrees"
    complete = whole["open"] == 0 and planted["stolen"] == planted["tested"]
    return "agrees" if complete else "undecided"


def plot(result: dict[str, Any], axes: Any) -> None:
    """Share of stolen words by the number of principal components that are kept."""
    series = result["series"]
    x = series["dimensions"]
    figures.line(axes, x, [100 * y for y in series["stolen share"]], "stolen (linear program)")
    guessed = [100 * y for y in series["guessed share"]]
    figures.line(axes, x, guessed, "argmax found by guessing", 1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(d) for d in x[:-1]] + [f"{x[-1]}\n(all)"])
    axes.set_ylim(-4, 104)
    figures.dress(
        axes,
        title="Words that no state can make the argmax",
        xlabel="principal components of the output embedding that are kept, log scale",
        ylabel="% of the words tested",
    )
