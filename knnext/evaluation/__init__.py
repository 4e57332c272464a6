"""Perplexity of the base model, of the neighbors, and of their mixture, on one text.

`search_stream` runs the model and the search once and keeps what they gave. `evaluate` turns that
into figures for one temperature and lmbda, in milliseconds. Fit those two on the validation
split (`knnext.evaluation.tune`) and call `evaluate` on the test split once.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from knnext.evaluation.bootstrap import FEW_DOCUMENTS, Interval
from knnext.evaluation.perplexity import Perplexity, TextCounts, bootstrap_nll, interval_of
from knnext.evaluation.scores import StreamScores, check_lmbda, check_temperature, mix_log_probs
from knnext.evaluation.stream import search_stream
from knnext.evaluation.token_log import check_token_log, write_token_log

__all__ = [
    "FEW_DOCUMENTS",
    "LITERATURE_FLOOR",
    "Evaluation",
    "Perplexity",
    "StreamScores",
    "check_token_log",
    "evaluate",
    "search_stream",
    "write_token_log",
]

LITERATURE_FLOOR = -10000.0  # log p_knn of the published code where no neighbor has the target


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        base: the language model alone.
        knn: the neighbors alone; infinite as soon as one target is not among them.
        knn_floored: the same with the floor that was asked for, else None.
        mixture: (1 - lmbda) p_lm + lmbda p_knn.
        oracle: per token the larger of p_lm and p_knn.
        log_ppl_difference: log perplexity (token level) of the mixture minus that of the base:
            below zero the neighbors help.
        difference_interval: of that, by paired bootstrap over documents.
        few_documents: whether there are fewer than `FEW_DOCUMENTS` of them, so that this and
            every other interval is mostly too narrow.
        target_found: share of the targets that some neighbor stands for.
        helped: share of the tokens to which the mixture gives more than the base.
        seconds: time of each part: `"lm"`, `"search"`, `"mix"`.
        tokens_per_second: the same as rates, with `"total"` for all parts together.
    """

    temperature: float
    lmbda: float
    k: int
    num_tokens: int
    num_words: int | None
    num_bytes: int | None
    num_documents: int
    base: Perplexity
    knn: Perplexity
    knn_floored: Perplexity | None
    mixture: Perplexity
    oracle: Perplexity
    log_ppl_difference: float
    difference_interval: Interval
    few_documents: bool
    target_found: float
    helped: float
    seconds: dict[str, float]
    tokens_per_second: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is infinite or not a number becomes None."""
        return cast("dict[str, Any]", _jsonable(asdict(self)))


def evaluate(
    scores: StreamScores,
    temperature: float,
    lmbda: float,
    *,
    knn_floor: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Evaluation:
    """Figures of base, neighbors, mixture and oracle at one temperature and lmbda.

    Sums are taken over tokens, never over averages of windows. Rows without a neighbor are left
    to the model in the mixture and count as probability 0 for the neighbors alone.

    Args:
        scores: from `search_stream`, of the split to report on.
        temperature: positive; fitted on another split.
        lmbda: in [0, 1]; fitted on another split.
        knn_floor: also report the neighbors alone with log p_knn no lower than this, as
            published code does (`LITERATURE_FLOOR` = -10000).
        resamples, seed, level: of the bootstrap over documents. With fewer than two documents
            there is nothing to resample and intervals are nan.
    """
    check_temperature(temperature)
    check_lmbda(lmbda)
    if scores.num_tokens == 0:
        raise ValueError("scores hold no tokens, there is nothing to evaluate")
    start = time.perf_counter()
    log_p_lm, log_p_knn = scores.log_p_lm.double(), scores.log_p_knn(temperature)
    mixture = mix_log_probs(log_p_lm, log_p_knn, lmbda, scores.has_neighbors)
    seconds = {**scores.seconds, "mix": time.perf_counter() - start}
    systems = {
        "base": log_p_lm,
        "knn": log_p_knn,
        "mixture": mixture,
        "oracle": torch.maximum(log_p_lm, log_p_knn),
    }
    if knn_floor is not None:
        systems["knn_floored"] = log_p_knn.clamp_min(knn_floor)
    counts = TextCounts.of(scores)
    samples = bootstrap_nll(scores.document_ids, systems, resamples=resamples, seed=seed)
    figures = {
        name: counts.perplexity(log_p, samples.get(name), level) for name, log_p in systems.items()
    }
    return Evaluation(
        temperature=float(temperature),
        lmbda=float(lmbda),
        k=scores.k,
        num_tokens=counts.tokens,
        num_words=counts.words,
        num_bytes=counts.bytes,
        num_documents=counts.documents,
        base=figures["base"],
        knn=figures["knn"],
        knn_floored=figures.get("knn_floored"),
        mixture=figures["mixture"],
        oracle=figures["oracle"],
        log_ppl_difference=figures["mixture"].nll - figures["base"].nll,
        difference_interval=_difference_interval(samples, level),
        few_documents=counts.documents < FEW_DOCUMENTS,
        target_found=float(scores.target_found.double().mean()),
        helped=float((mixture > log_p_lm).double().mean()),
        seconds=seconds,
        tokens_per_second=_rates(counts.tokens, seconds),
    )


def _difference_interval(samples: dict[str, Any], level: float) -> Interval:
    """Paired: both systems are measured on the same draws."""
    if "mixture" not in samples or "base" not in samples:
        return interval_of(None, level)
    return interval_of(samples["mixture"] - samples["base"], level)


def _rates(count: int, seconds: dict[str, float]) -> dict[str, float]:
    times = {**seconds, "total": sum(seconds.values())}
    return {name: count / spent if spent > 0 else math.inf for name, spent in times.items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(entry) for name, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
