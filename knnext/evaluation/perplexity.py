"""Perplexity per token, word and byte, and its interval over documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from knnext.evaluation.bootstrap import FloatArray, Interval, percentile_interval, resample_means
from knnext.evaluation.scores import StreamScores


@dataclass(frozen=True)
class Perplexity:
    """One system's figures over a text, from its summed negative log-likelihood S in nats.

    Attributes:
        token: exp(S / targets).
        word: exp(S / words); where nobody asked for another count of words, each mark between
            documents that is scored is one, as `</s>` is in the literature. None where the words
            are not known.
        bits_per_byte: S / (ln 2 x bytes of the text); None where the bytes are not known.
        nll: S / targets, nats per token.
        interval: of `token`, by bootstrap over documents.
    """

    token: float
    word: float | None
    bits_per_byte: float | None
    nll: float
    interval: Interval


@dataclass(frozen=True)
class TextCounts:
    """The denominators: targets, words with the marks between documents, bytes of text."""

    tokens: int
    words: int | None
    bytes: int | None
    documents: int

    @classmethod
    def of(cls, scores: StreamScores) -> TextCounts:
        """Counts of the text that was scored; 0 words or bytes means nobody counted them."""
        words, num_bytes = int(scores.num_words.sum()), int(scores.num_bytes.sum())
        marks = int(scores.ends_document.sum()) if scores.words == "marks" else 0
        return cls(
            tokens=scores.num_tokens,
            words=words + marks if words else None,
            bytes=num_bytes or None,
            documents=int(scores.document_ids.unique().numel()),
        )

    def perplexity(
        self, log_p: Tensor, nll_samples: FloatArray | None = None, level: float = 0.95
    ) -> Perplexity:
        """Figures of one system from its (n,) log-probabilities and bootstrapped nll."""
        total = -float(log_p.double().sum())
        spread = interval_of(nll_samples, level)
        return Perplexity(
            token=_exp(total / self.tokens),
            word=None if self.words is None else _exp(total / self.words),
            bits_per_byte=None if self.bytes is None else total / math.log(2) / self.bytes,
            nll=total / self.tokens,
            interval=Interval(_exp(spread.low), _exp(spread.high), level),
        )


def bootstrap_nll(
    document_ids: Tensor, systems: Mapping[str, Tensor], *, resamples: int, seed: int
) -> dict[str, FloatArray]:
    """(resamples,) nats per token of each system, all over the same draws of documents.

    A system that gives some target probability 0 has no finite mean and is left out, as are all
    where there are fewer than two documents.
    """
    _, ids = document_ids.unique(return_inverse=True)
    documents = int(ids.max()) + 1 if ids.numel() else 0
    finite = {name: log_p for name, log_p in systems.items() if bool(log_p.isfinite().all())}
    if documents < 2 or not finite or resamples < 1:
        return {}
    sums = torch.zeros(documents, len(finite), dtype=torch.float64, device="cpu")
    sums.index_add_(0, ids, -torch.stack(list(finite.values()), 1).double())
    counts = ids.bincount(minlength=documents)
    means = resample_means(sums.numpy(), counts.numpy(), resamples=resamples, seed=seed)
    return {name: means[:, column] for column, name in enumerate(finite)}


def interval_of(samples: FloatArray | None, level: float) -> Interval:
    """The percentile interval of samples, nan without any."""
    return percentile_interval(np.empty(0) if samples is None else samples, level)


def _exp(value: float) -> float:
    # math.exp raises past 709 nats, where a perplexity is as good as infinite.
    return math.exp(value) if not value > 709 else math.inf
