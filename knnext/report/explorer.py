"""The data behind the report's token explorer: excerpts of the test text and their neighbors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knnext.evaluation.prompt import pieces
from knnext.evaluation.spans import decode_all, neighbor_spans
from knnext.report import script_json
from knnext.report.copies import copied_runs
from knnext.report.excerpts import (
    PHRASE,
    Excerpt,
    choose_excerpts,
    document_positions,
    select,
    telling_token,
)

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.evaluation.scores import StreamScores

_VOTES = 5
#: Of the data in a page: a page of 2 MB opens at once from a disk and goes into a mail.
MAX_BYTES = 1_500_000
_SHORT = 96  # tokens of an excerpt: with fewer a reader loses the thread


@dataclass(frozen=True)
class System:
    """One way of searching, with what it found for the test split and the mixture it is shown in.

    ``words``: what the name means, for people.
    """

    name: str
    scores: StreamScores
    temperature: float
    lmbda: float
    words: str = ""


@dataclass
class Numbering:
    """Gives each distinct thing a number, in order of first use."""

    numbers: dict[Any, int] = field(default_factory=dict)

    def __call__(self, thing: Any) -> int:
        return self.numbers.setdefault(thing, len(self.numbers))


def explorer_data(
    systems: Sequence[System],
    datastore: Datastore,
    tokenizer: Any,
    *,
    num_excerpts: int = 12,
    excerpt_tokens: int = 256,
    num_neighbors: int = 6,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Any]:
    """Excerpts as plain values for the page's script.

    Nothing in the choice of excerpts looks at how well a text was predicted; see
    `choose_excerpts`.

    Args:
        systems: on one text and datastore, their scores with `indices`; the first is shown first,
            and its neighbors tell which text is a copy.
        datastore: the one that was searched.
        tokenizer: the one it was built with.
        num_excerpts, excerpt_tokens, num_neighbors: at most so many of each.
        max_bytes: at most about so much JSON; first excerpts become shorter, then fewer.
    """
    if not systems:
        raise ValueError("systems must name at least one")
    if any(system.scores.indices is None for system in systems):
        raise ValueError("scores must hold indices: run search_stream with keep_indices=True")
    while True:
        data = _data(systems, datastore, tokenizer, num_excerpts, excerpt_tokens, num_neighbors)
        share = max_bytes / len(script_json(data).encode())
        if share >= 1:
            return data
        # A little less than by proportion: what excerpts share does not shrink with them.
        if excerpt_tokens > _SHORT:
            excerpt_tokens = max(_SHORT, int(0.95 * share * excerpt_tokens))
        elif num_excerpts > 1:
            num_excerpts = max(1, int(share * min(num_excerpts, len(data["excerpts"]))))
        elif excerpt_tokens > 1:
            excerpt_tokens = max(1, int(0.95 * share * excerpt_tokens))
        else:
            return data


def _data(
    systems: Sequence[System],
    datastore: Datastore,
    tokenizer: Any,
    num_excerpts: int,
    excerpt_tokens: int,
    num_neighbors: int,
) -> dict[str, Any]:
    vocabulary, documents, rows = Numbering(), Numbering(), Numbering()
    excerpts = [
        _plain(excerpt, systems, tokenizer, num_neighbors, vocabulary, rows)
        for excerpt in choose_excerpts(systems[0].scores, num_excerpts, excerpt_tokens)
    ]
    wanted = torch.tensor(list(rows.numbers), dtype=torch.int64, device="cpu")
    found = neighbor_spans(datastore, tokenizer, wanted)
    tokens = datastore.values[wanted].tolist()
    spans = [
        [span.excerpt[0], vocabulary(token), span.excerpt[1], documents(span.document)]
        for span, token in zip(found, tokens, strict=True)
    ]
    return {
        "k": systems[0].scores.k,
        "systems": [
            {"name": s.name, "words": s.words, "temperature": s.temperature, "lmbda": s.lmbda}
            for s in systems
        ],
        "documents": list(documents.numbers),
        "vocab": decode_all(tokenizer, [[token] for token in vocabulary.numbers]),
        "spans": spans,
        "excerpts": excerpts,
    }


def _plain(
    excerpt: Excerpt,
    systems: Sequence[System],
    tokenizer: Any,
    num_neighbors: int,
    vocabulary: Numbering,
    rows: Numbering,
) -> dict[str, Any]:
    """One excerpt as the script reads it."""
    scores = systems[0].scores
    whole = document_positions(scores, excerpt.document)
    first = int(excerpt.positions[0] - whole[0])
    # What stands before an excerpt tells how its first tokens are written.
    ids = scores.targets[whole[: first + len(excerpt.positions)]].tolist()
    texts = pieces(tokenizer, ids, first)
    part = select(scores, excerpt.positions)
    gains = part.log_p(systems[0].temperature, systems[0].lmbda) - part.log_p_lm.double()
    runs, phrases = copied_runs(part), copied_runs(part, PHRASE)
    return {
        "name": scores.document_names[excerpt.document],
        "first": first,
        "cut": [first > 0, first + len(excerpt.positions) < len(whole)],
        "texts": texts,
        "targets": [vocabulary(token) for token in part.targets.tolist()],
        "lm": logs(part.log_p_lm),
        "copied": runs.tolist(),
        "start": telling_token(texts, gains, phrases),
        "systems": [
            _system(system, excerpt.positions, num_neighbors, vocabulary, rows)
            for system in systems
        ],
    }


def _system(
    system: System, positions: Tensor, num_neighbors: int, vocabulary: Numbering, rows: Numbering
) -> dict[str, Any]:
    part = select(system.scores, positions)
    shares = torch.softmax(-part.distances.double() / system.temperature, dim=1).nan_to_num(0.0)
    return {
        "knn": logs(part.log_p_knn(system.temperature)),
        "votes": _votes(part, shares, vocabulary),
        "near": _near(part, shares, num_neighbors, rows),
    }


def _votes(part: StreamScores, shares: Tensor, vocabulary: Numbering) -> list[list[float]]:
    """Of each position the tokens with the largest p_knn: token, p, token, p, ..."""
    votes = []
    for tokens, share in zip(part.tokens, shares, strict=True):
        kept = tokens >= 0
        named, place = tokens[kept].unique(return_inverse=True)
        sums = torch.zeros(len(named), dtype=torch.float64, device="cpu")
        top = sums.index_add_(0, place, share[kept]).topk(min(_VOTES, len(sums)))
        line: list[float] = []
        for value, at in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            line += [vocabulary(int(named[at])), _short(value)]
        votes.append(line)
    return votes


def _near(part: StreamScores, shares: Tensor, count: int, rows: Numbering) -> list[list[float]]:
    """Of each position the nearest rows: span, distance, share of p_knn, ..."""
    assert part.indices is not None
    lists = zip(
        part.indices[:, :count].tolist(),
        part.distances[:, :count].tolist(),
        shares[:, :count].tolist(),
        strict=True,
    )
    near = []
    for line in lists:
        kept = [entry for entry in zip(*line, strict=True) if entry[0] >= 0]
        near.append([x for row, d, share in kept for x in (rows(row), _short(d), _short(share))])
    return near


def logs(values: Tensor) -> list[float | None]:
    """Logs with five digits behind the point; None for -inf, which JSON has no word for."""
    return [round(x, 5) if math.isfinite(x) else None for x in values.tolist()]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
