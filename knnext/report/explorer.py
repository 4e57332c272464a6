"""The data behind the token explorer: excerpts of the test text with each token's neighbors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knnext.evaluation.spans import decode_all, neighbor_spans

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.evaluation.scores import StreamScores

_VOTES = 5


@dataclass
class _Numbering:
    """Gives each distinct thing a number, in order of first use."""

    numbers: dict[Any, int] = field(default_factory=dict)

    def __call__(self, thing: Any) -> int:
        return self.numbers.setdefault(thing, len(self.numbers))


def explorer_data(
    scores: StreamScores,
    datastore: Datastore,
    tokenizer: Any,
    temperature: float,
    lmbda: float,
    *,
    num_excerpts: int = 12,
    excerpt_tokens: int = 256,
    num_neighbors: int = 8,
) -> dict[str, Any]:
    """Excerpts as plain values for the page's script.

    Excerpts are taken at even distances through the documents that are long enough (or, where
    none is, the longest), each out of the middle of what was scored: nothing in the choice looks
    at how well a text was predicted.

    Args:
        scores: of the test split, with `indices`.
        datastore: the one that was searched.
        tokenizer: the one it was built with.
        temperature, lmbda: of the mixture shown.
        num_excerpts, excerpt_tokens, num_neighbors: at most so many of each.
    """
    if scores.indices is None:
        raise ValueError("scores must hold indices: run search_stream with keep_indices=True")
    vocabulary, documents, rows = _Numbering(), _Numbering(), _Numbering()
    excerpts = []
    for positions in choose_excerpts(scores, num_excerpts, excerpt_tokens):
        excerpt = _Excerpt(scores, positions, temperature, lmbda)
        excerpts.append(excerpt.plain(num_neighbors, vocabulary, rows))
    spans = []
    found = neighbor_spans(
        datastore, tokenizer, torch.tensor(list(rows.numbers), dtype=torch.int64, device="cpu")
    )
    tokens = datastore.values[
        torch.tensor(list(rows.numbers), dtype=torch.int64, device="cpu")
    ].tolist()
    for span, token in zip(found, tokens, strict=True):
        spans.append([span.before, vocabulary(token), span.after, documents(span.document)])
    return {
        "k": scores.k,
        "temperature": temperature,
        "lmbda": lmbda,
        "documents": list(documents.numbers),
        "vocab": decode_all(tokenizer, [[token] for token in vocabulary.numbers]),
        "spans": spans,
        "excerpts": excerpts,
    }


def choose_excerpts(scores: StreamScores, count: int, length: int) -> list[Tensor]:
    """Positions (int64) of each excerpt: consecutive targets of one document."""
    documents, sizes = scores.document_ids[~scores.ends_document].unique(return_counts=True)
    usable = documents[sizes >= min(length, int(sizes.max()))] if len(documents) else documents
    picks = min(count, len(usable))
    excerpts = []
    for i in range(picks):
        document = usable[int((i + 0.5) * len(usable) / picks)]
        positions = torch.nonzero((scores.document_ids == document) & ~scores.ends_document)[:, 0]
        start = max(0, (len(positions) - length) // 2)
        excerpts.append(positions[start : start + length])
    return excerpts


class _Excerpt:
    """The scores of some positions, turned into plain values."""

    def __init__(
        self, scores: StreamScores, positions: Tensor, temperature: float, lmbda: float
    ) -> None:
        self.scores, self.positions = scores, positions
        part = _select(scores, positions)
        self.log_p_knn = part.log_p_knn(temperature)
        self.log_p = part.log_p(temperature, lmbda)
        self.shares = torch.softmax(-part.distances.double() / temperature, dim=1).nan_to_num(0.0)
        self.part = part

    def plain(self, num_neighbors: int, vocabulary: _Numbering, rows: _Numbering) -> dict[str, Any]:
        document = int(self.scores.document_ids[self.positions[0]])
        before = (self.scores.document_ids == document) & ~self.scores.ends_document
        first = int(before[: int(self.positions[0])].sum())
        return {
            "name": self.scores.document_names[document],
            "first": first,
            "targets": [vocabulary(token) for token in self.part.targets.tolist()],
            "lm": _logs(self.part.log_p_lm),
            "knn": _logs(self.log_p_knn),
            "mix": _logs(self.log_p),
            "votes": self._votes(vocabulary),
            "near": self._near(num_neighbors, rows),
        }

    def _votes(self, vocabulary: _Numbering) -> list[list[float]]:
        """Of each position the tokens with the largest p_knn: token, p, token, p, ..."""
        votes = []
        for tokens, shares in zip(self.part.tokens, self.shares, strict=True):
            kept = tokens >= 0
            named, place = tokens[kept].unique(return_inverse=True)
            sums = torch.zeros(len(named), dtype=torch.float64, device="cpu").index_add_(
                0, place, shares[kept]
            )
            top = sums.topk(min(_VOTES, len(sums)))
            line: list[float] = []
            for share, at in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                line += [vocabulary(int(named[at])), _short(share)]
            votes.append(line)
        return votes

    def _near(self, count: int, rows: _Numbering) -> list[list[float]]:
        """Of each position the nearest rows: span, distance, share of p_knn, ..."""
        assert self.part.indices is not None
        lists = zip(
            self.part.indices[:, :count].tolist(),
            self.part.distances[:, :count].tolist(),
            self.shares[:, :count].tolist(),
            strict=True,
        )
        near = []
        for line in lists:
            kept = [entry for entry in zip(*line, strict=True) if entry[0] >= 0]
            near.append(
                [x for row, d, share in kept for x in (rows(row), _short(d), _short(share))]
            )
        return near


def _select(scores: StreamScores, positions: Tensor) -> StreamScores:
    names = (
        "log_p_lm",
        "targets",
        "document_ids",
        "ends_document",
        "distances",
        "tokens",
        "indices",
    )
    return type(scores)(**{name: getattr(scores, name)[positions] for name in names})


def _logs(values: Tensor) -> list[float | None]:
    """Rounded logs; None for -inf, which JSON has no word for."""
    return [round(x, 4) if math.isfinite(x) else None for x in values.tolist()]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
