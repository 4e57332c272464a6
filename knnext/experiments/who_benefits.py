"""Which tokens the kNN helps: by frequency, by entropy, by what the LM thinks, by document.

Each feature of the target is known without the kNN. Tokens are put into buckets by one feature at
a time; a bucket's figure is the mean change of nll there, with an interval over documents. Beware
of buckets by the LM's own probability of the target: they are chosen by its errors, so any second
opinion gains where the LM was wrong and loses where it was right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from knnext.evaluation.scores import mix_log_probs
from knnext.evaluation.token_log import write_token_log
from knnext.experiments.lab import Lab
from knnext.experiments.lab import token_features as features
from knnext.experiments.lab.contrast import advantage
from knnext.experiments.lab.correlation import spearman
from knnext.experiments.lab.cut import cut
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.figures import COLORS, INK, MUTED, dress, percent_change
from knnext.experiments.lab.mixture import DEFAULT_TEMPERATURES, Split, fit
from knnext.experiments.lab.results import Description, Findings, PaperFigure

DESCRIPTION = Description(
    name="who-benefits",
    title="Which tokens benefit",
    question="Which tokens does the kNN help: rare or frequent, sure or unsure, in documents that "
    "repeat the training text or in new ones?",
    claim="The code correlates how often the kNN wins, word by word, with the entropy of what "
    "follows and precedes the word; the paper's conclusions were not at hand.",
    varies="nothing: one member of the family (att, l2, exact, real), looked at token by token",
    paper=(
        PaperFigure("over all training tokens the kNN beats the LM on 29.2 %", "code"),
        PaperFigure("loss by decade of training frequency, 10 to over 1 M", "code"),
    ),
)

NGRAM, QUANTILES, MIN_OCCURRENCES = 4, 5, 5
_SMALLEST = 0.01  # of the tokens: smaller buckets are in the table alone
FREQUENCY = "training frequency"
FOLLOWS, PRECEDES = "entropy of what follows", "entropy of what precedes"
UNSURE, GIVEN, SEEN = "LM's entropy", "LM's probability of the target", "n-grams seen in training"


@dataclass(frozen=True)
class Feature:
    """(n,) float64 values of the test targets, their buckets, and a name for each bucket."""

    values: Tensor
    buckets: Tensor
    names: dict[int, str]


def run(lab: Lab) -> Findings:
    """Fit on valid, then look at test token by token."""
    valid, test = lab.splits()
    grid = lab.preset.option("who-benefits.temperatures", DEFAULT_TEMPERATURES)
    temperature, lmbda, _ = fit(valid, lab.component(Setting()), grid)
    scores = lab.neighbors(Setting(), "test")
    log_p_knn = scores.log_p_knn(temperature)
    log_p = mix_log_probs(test.log_p_lm, log_p_knn, lmbda)
    wins = (log_p_knn > test.log_p_lm).double()
    known = token_features(lab, test)
    gain, resamples = log_p - test.log_p_lm, lab.preset.resamples
    rows = [
        r for name, f in known.items() for r in bucket_rows(name, f, test, log_p, wins, resamples)
    ]
    ranks = {
        name: spearman(f.values, gain, test.document_ids, resamples=resamples)
        for name, f in known.items()
    }
    words = _by_word(lab, test, wins)
    log = write_token_log(
        scores,
        lab.folder / "who-benefits-tokens.jsonl",
        temperature,
        lmbda,
        {name: f.values for name, f in known.items()},
    )
    return Findings(
        rows=[{n: v for n, v in r.items() if n not in ("low", "high", "gain")} for r in rows],
        agreement="undecided",
        words=f"There is no claim to compare with. {_extremes(rows)} Spearman's correlation of a "
        "token's gain with: "
        + "; ".join(f"{name} {c}" for name, c in ranks.items())
        + f". {_spread(gain)}",
        headline=_headline(rows),
        series={"rows": rows},
        details={
            "temperature": temperature,
            "lmbda": lmbda,
            "all": advantage(test, log_p, test.log_p_lm, resamples).to_dict(),
            "wins": float(wins.mean()),
            "correlation with the gain": {
                name: [c.value, c.interval.low, c.interval.high] for name, c in ranks.items()
            },
            "by word": words,
            "novelty": f"share of the document's {_ngram(lab)}-grams of tokens, as far as it was "
            "scored, that occur in the training text; each place counts",
            "token log": log.name,
        },
    )


def token_features(lab: Lab, test: Split) -> dict[str, Feature]:
    """Every feature of the test targets, in the order of the table."""
    train, lm = lab.text("train"), lab.lm()
    size = max(lab.padding_token, int(train.tokens.max()) + 1)
    counts = features.frequencies(train.tokens, size)
    follows, precedes = features.bigram_entropies(train.tokens, size)
    states = lab.states("test", "ffn")
    entropy = cut(states.keys, lm.output_embedding, lm.output_bias, test.targets, (1,)).entropy
    share = features.seen_share(lab.text("test"), train, _ngram(lab), size)[test.document_ids]
    frequency = counts[test.targets]
    decades = features.decades(frequency)
    return {
        FREQUENCY: Feature(frequency.double(), decades, _decade_names(int(decades.max()))),
        FOLLOWS: _quantiles(follows[test.targets], QUANTILES),
        PRECEDES: _quantiles(precedes[test.targets], QUANTILES),
        UNSURE: _quantiles(entropy, QUANTILES),
        GIVEN: _quantiles(test.log_p_lm.exp(), 2 * QUANTILES),
        SEEN: _quantiles(share.nan_to_num(0.0), QUANTILES),
    }


def bucket_rows(
    name: str, feature: Feature, test: Split, log_p: Tensor, wins: Tensor, resamples: int
) -> list[dict[str, Any]]:
    """One row a bucket that holds tokens. The shares of the gain add up to 1 over a feature."""
    total = float((log_p - test.log_p_lm).sum())
    rows = []
    for bucket in feature.buckets.unique().tolist():
        chosen = feature.buckets == bucket
        part = replace(
            test,
            log_p_lm=test.log_p_lm[chosen],
            targets=test.targets[chosen],
            document_ids=test.document_ids[chosen],
        )
        gain = advantage(part, log_p[chosen], part.log_p_lm, resamples)
        summed = float((log_p[chosen] - part.log_p_lm).sum())
        rows.append(
            {
                "by": name,
                "bucket": feature.names[bucket],
                "tokens": int(chosen.sum()),
                "documents": int(part.document_ids.unique().numel()),
                "LM nll": -float(part.log_p_lm.mean()),
                "mixture nll": -float(log_p[chosen].mean()),
                "change of perplexity": str(gain),
                "share of the whole gain": summed / total if total else None,
                "kNN beats LM": float(wins[chosen].mean()),
                "gain": gain.value,
                "low": gain.interval.low,
                "high": gain.interval.high,
            }
        )
    return rows


def _ngram(lab: Lab) -> int:
    return int(lab.preset.option("who-benefits.ngram", NGRAM))


def _quantiles(values: Tensor, count: int) -> Feature:
    """About equally many tokens in each bucket; equal values share one."""
    values = values.double()
    buckets = features.quantile_buckets(values, count)
    names = {}
    for bucket in buckets.unique().tolist():
        inside = values[buckets == bucket]
        names[bucket] = f"{float(inside.min()):.2g} to {float(inside.max()):.2g}"
    return Feature(values, buckets, names)


def _decade_names(most: int) -> dict[int, str]:
    return {0: "0", **{d: f"{10 ** (d - 1):,}+" for d in range(1, most + 1)}}


def _by_word(lab: Lab, test: Split, wins: Tensor) -> dict[str, Any]:
    """The published analysis: how often the kNN wins, word by word, against the entropies."""
    train = lab.text("train")
    size = max(lab.padding_token, int(train.tokens.max()) + 1)
    counts = test.targets.bincount(minlength=size)
    won = torch.zeros(size, dtype=torch.float64, device="cpu").index_add_(0, test.targets, wins)
    kept = counts >= lab.preset.option("who-benefits.min_occurrences", MIN_OCCURRENCES)
    found: dict[str, Any] = {"words": int(kept.sum())}
    if found["words"] < 3:
        return found
    share, ids = won[kept] / counts[kept], torch.arange(found["words"], device="cpu")
    for name, entropy in zip(
        (FOLLOWS, PRECEDES), features.bigram_entropies(train.tokens, size), strict=True
    ):
        c = spearman(share, entropy[kept], ids, resamples=lab.preset.resamples)
        found[name] = [c.value, c.interval.low, c.interval.high]
    return found


def _spread(gain: Tensor) -> str:
    """How unevenly the gain lies over tokens, which ranks do not show."""
    tenth = gain.sort(descending=True).values[: -(-len(gain) // 10)]
    winning, whole = f"{float((gain > 0).double().mean()):.0%} of the tokens gain", gain.sum()
    if not whole > 0:
        return f"{winning}, but not all together."
    times = float(tenth.sum() / whole)
    return (
        f"{winning}; the tenth that gains most gains {times:.1f} times what all tokens together do."
    )


def _extremes(rows: list[dict[str, Any]]) -> str:
    """Where it helps most and least by each feature."""
    said = []
    for name, here in _large(rows).items():
        most, least = (pick(here, key=lambda r: r["gain"]) for pick in (max, min))
        said.append(
            f"{name}: most at {most['bucket']} ({most['change of perplexity']}), least at "
            f"{least['bucket']} ({least['change of perplexity']})"
        )
    return "The kNN helps, by " + "; by ".join(said) + "."


def _large(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by feature, without buckets of a few tokens."""
    by: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["by"], []).append(row)
    return {
        name: [r for r in here if r["tokens"] >= _SMALLEST * sum(x["tokens"] for x in here)]
        for name, here in by.items()
    }


def _headline(rows: list[dict[str, Any]]) -> str:
    """Documents new to the training text against those that repeat it."""
    first, *more = [r for r in rows if r["by"] == SEEN]
    if not more:  # one document, or all alike
        return f"{first['change of perplexity']} with {first['bucket']} of n-grams seen in training"
    last = more[-1]
    return (
        f"{first['change of perplexity']} in documents with {first['bucket']} of n-grams seen in "
        f"training, {last['change of perplexity']} with {last['bucket']}"
    )


def plot(result: dict[str, Any], axes: Any) -> None:
    """One panel a feature: change of perplexity by bucket, those of a few tokens left out.

    All panels have one scale, so that bars may be compared across them.
    """
    by = _large(result["series"]["rows"])
    figure = axes.figure
    axes.remove()
    counts = [len(here) for here in by.values()]
    tallest = [max(counts[:3]), max(counts[3:], default=1)]
    figure.set_size_inches(11.0, 2.0 + 0.27 * sum(tallest))
    grid = figure.subplots(2, 3, sharex=True, gridspec_kw={"height_ratios": tallest})
    figure.suptitle(result["title"], x=0.01, ha="left", fontsize=12, color=INK)
    for number, (panel, (name, here)) in enumerate(zip(grid.flat, by.items(), strict=True)):
        values = [percent_change(r["gain"]) for r in here]
        # Blue where the neighbors help, orange where they harm, as in the pages.
        panel.barh(range(len(here)), values, color=[COLORS[v > 0] for v in values], height=0.66)
        for place, row in enumerate(here):
            if row["low"] is not None:
                ends = [percent_change(row["low"]), percent_change(row["high"])]
                panel.plot(ends, [place, place], color=INK, linewidth=1.2)
        panel.axvline(0, color=MUTED, linewidth=1.0)
        dress(
            panel,
            title=name,
            xlabel="change of perplexity, %" if number >= 3 else "",
            ylabel="",
            legend=False,
        )
        panel.set_yticks(range(len(here)), [r["bucket"] for r in here], fontsize=8)
        # Of one height in all panels, whatever the number of buckets.
        panel.set_ylim(max(tallest[number // 3], len(here)) - 0.5, -0.5)
    for panel in list(grid.flat)[len(by) :]:
        panel.remove()
