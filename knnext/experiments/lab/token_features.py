"""What is known of a token besides its probability: how often, how surely followed, how new."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.corpus import TokenizedDocuments

IntArray = NDArray[np.int64]
CodeArray = NDArray[np.uint64]


def frequencies(tokens: NDArray[np.int32], vocab_size: int) -> Tensor:
    """(V,) int64 occurrences of each token."""
    return torch.from_numpy(np.bincount(tokens, minlength=vocab_size).astype(np.int64))


def decades(counts: Tensor) -> Tensor:
    """Digits of each count: 0 for 0, 1 for 1 to 9, 2 for 10 to 99, and so on."""
    digits = torch.zeros_like(counts)
    bound = 1
    while bool((counts >= bound).any()):
        digits += counts >= bound
        bound *= 10
    return digits


def bigram_entropies(tokens: NDArray[np.int32], vocab_size: int) -> tuple[Tensor, Tensor]:
    """(V,) float64 entropies in nats of what follows each token and of what precedes it.

    From the counts of neighboring pairs in one stream. A token without a pair has entropy 0.
    """
    codes = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
    pairs, counts = np.unique(codes, return_counts=True)
    first, second = pairs // vocab_size, pairs % vocab_size
    return _entropies(first, counts, vocab_size), _entropies(second, counts, vocab_size)


def _entropies(owners: IntArray, counts: IntArray, size: int) -> Tensor:
    """H of each owner's counts: log of their sum minus the mean of their logs."""
    totals = np.bincount(owners, counts, size)
    logs = np.bincount(owners, counts * np.log(counts), size)
    held = np.maximum(totals, 1)
    return torch.from_numpy(np.maximum(np.log(held) - logs / held, 0))


def seen_share(
    text: TokenizedDocuments, train: TokenizedDocuments, n: int, vocab_size: int
) -> Tensor:
    """(documents,) float64 share of each document's n-grams that occur in `train`.

    An n-gram is n consecutive tokens of one document, the mark at its beginning among them; each
    place counts, so a phrase that is said twice counts twice. nan for a document of fewer tokens.
    A document whose share is low is new.
    """
    known = np.unique(_ngrams(train, n, vocab_size)[0])
    codes, owners = _ngrams(text, n, vocab_size)
    size = len(text.document_offsets) - 1
    places = np.bincount(owners, minlength=size)
    seen = np.bincount(owners, np.isin(codes, known), size)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(seen / places)


def _ngrams(text: TokenizedDocuments, n: int, vocab_size: int) -> tuple[CodeArray, IntArray]:
    """(m,) a code for each n-gram within a document, and the documents they lie in.

    Codes are numbers in base V (or V + 1, made odd): exact while V^n < 2^64, else a hash.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    tokens = text.tokens.astype(np.uint64)
    count = max(0, len(tokens) - n + 1)
    codes = np.zeros(count, dtype=np.uint64)
    base = np.uint64(vocab_size | 1)
    for shift in range(n):
        codes = codes * base + tokens[shift : shift + count]
    owners = np.searchsorted(text.document_offsets, np.arange(count), side="right") - 1
    inside = np.arange(count) + n <= np.asarray(text.document_offsets)[owners + 1]
    return codes[inside], owners[inside].astype(np.int64)


def quantile_buckets(values: Tensor, count: int) -> Tensor:
    """(n,) int64 bucket 0..count-1 by rank; equal values share the bucket of their first."""
    order = values.argsort(stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(values), device="cpu")
    _, inverse = values.unique(return_inverse=True)
    lowest = torch.full((int(inverse.max()) + 1,), len(values), dtype=torch.int64, device="cpu")
    lowest.scatter_reduce_(0, inverse, ranks, "amin")
    return lowest[inverse] * count // len(values)
