"""Which tokens the kNN helps: by frequency, by entropy, by what the LM thinks, by document.

Each feature of the target is known without the kNN. Tokens are put into buckets by one feature at
a time; a bucket's figure is the mean change of nll there, with an interval over documents. Beware
of buckets by the LM's own probability of the target: they are chosen by its errors, so any second
opinion gains where the LM was wrong and loses where it was right.
"""

from __future__ import annotations

import textwrap
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
from knnext.experiments.lab.figures import (
    INK,
    MUTED,
    PALE,
    PALE_OVER,
    dress,
    note,
    percent_change,
)
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


#: What a bar of a panel is, in words with their unit.
_PANELS = {
    FREQUENCY: "how often the token is in the training text",
    FOLLOWS: "entropy of what follows the token, nats",
    PRECEDES: "entropy of what precedes the token, nats",
    UNSURE: "entropy of the LM's prediction, nats",
    GIVEN: "the LM's probability of the target*",
    SEEN: "the document's n-grams seen in training, %",
}
_NOTE = (
    "One scale for all panels. Blue: the neighbors help, orange: they harm; lines: 95 % intervals."
    "\n\n* Such tokens are chosen by the LM's errors: any second opinion gains where it was wrong "
    "and loses where it was right."
)


def plot(result: dict[str, Any], axes: Any) -> None:
    """One panel a feature: change of perplexity by bucket, those of a few tokens left out.

    All panels have one scale, so that bars may be compared across them; the one of most buckets
    stands at the side of the others, so that no panel is empty in part.
    """
    by = dict(sorted(_large(result["series"]["rows"]).items(), key=lambda one: len(one[1])))
    figure = axes.figure
    axes.remove()
    tall = max(by, key=lambda name: len(by[name]))
    small = [name for name in by if name != tall]
    rows = max(1, (len(small) + 1) // 2)
    figure.set_size_inches(11.0, 1.6 + 2.0 * rows)
    grid = figure.add_gridspec(rows, 3)
    places = [grid[i // 2, i % 2] for i in range(len(small))]
    first = figure.add_subplot(grid[:, 2])
    panels = {tall: first}
    for name, place in zip(small, places, strict=True):
        panels[name] = figure.add_subplot(place, sharex=first)
    figure.suptitle("Which tokens the neighbors help", x=0.01, ha="left", fontsize=12, color=INK)
    for name, panel in panels.items():
        _draw(panel, name, by[name], foot=name in (tall, *small[-2:]))
    if len(small) % 2:
        _say(figure.add_subplot(grid[rows - 1, 1]), _NOTE)
    else:
        note(figure, _NOTE)


def _say(panel: Any, text: str) -> None:
    """Sentences in the place of a panel."""
    panel.axis("off")
    lines = [textwrap.fill(part, 40) for part in text.splitlines()]
    panel.text(0, 0.75, "\n".join(lines), va="top", fontsize=9, color=MUTED)


def _draw(panel: Any, name: str, rows: Sequence[Mapping[str, Any]], foot: bool) -> None:
    values = [percent_change(row["gain"]) for row in rows]
    # Blue where the neighbors help, orange where they harm, as in the pages.
    colors = [PALE_OVER if value > 0 else PALE for value in values]
    panel.barh(range(len(rows)), values, color=colors, height=0.66)
    for place, row in enumerate(rows):
        if row["low"] is not None:
            ends = [percent_change(row["low"]), percent_change(row["high"])]
            panel.plot(ends, [place, place], color=INK, linewidth=1.2)
        panel.plot([values[place]], [place], "|", color=INK)
    panel.axvline(0, color=MUTED, linewidth=1.0)
    dress(
        panel,
        title="",
        xlabel="change of perplexity (test), %" if foot else "",
        ylabel="",
        legend=False,
    )
    panel.set_title(_PANELS.get(name, name), loc="left", fontsize=9.5, color=INK)
    panel.set_yticks(range(len(rows)), [_bucket(name, row["bucket"]) for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)


def _bucket(name: str, bucket: str) -> str:
    """`8.5e-07 to 0.0002` as it is read: `up to 0.0002`; `10+` as the decade it is."""
    if name == FREQUENCY and bucket.endswith("+"):
        least = int(bucket[:-1].replace(",", ""))
        return f"{least:,} to {10 * least - 1:,}"
    if name == SEEN and " to " in bucket:
        return " to ".join(f"{100 * float(end):.0f}" for end in bucket.split(" to "))
    low, _, high = bucket.partition(" to ")
    return f"up to {high}" if high and float(low) < float(high) / 20 else bucket
