"""Which pieces of the test text the explorer shows, and where it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knnext.report.copies import copied_runs

if TYPE_CHECKING:
    from knnext.evaluation.scores import StreamScores

_STARTS = 9  # tried in one document, evenly spread
#: Tokens on end that make a phrase of the datastore. A licence that names another owner, or breaks
#: its lines elsewhere, is no copy to the letter, and still tells a reader nothing.
PHRASE = 8


@dataclass(frozen=True)
class Excerpt:
    """``positions`` (m,) int64 of consecutive targets of one document; ``copied``: the share of
    them in phrases that the datastore holds to the letter."""

    document: int
    positions: Tensor
    copied: float


def choose_excerpts(scores: StreamScores, count: int, length: int) -> list[Excerpt]:
    """Excerpts of consecutive targets of one document each, those with the fewest copies first.

    Documents are taken at even distances through those that are long enough (or, where none is,
    the longest), and of each the part that is least a copy of the datastore. Of texts that are
    alike, one is shown. How well a text was predicted is not looked at.
    """
    documents, sizes = scores.document_ids[~scores.ends_document].unique(return_counts=True)
    usable = documents[sizes >= min(length, int(sizes.max()))] if len(documents) else documents
    picks = min(count, len(usable))
    excerpts: list[Excerpt] = []
    seen: set[tuple[int, ...]] = set()
    for i in range(picks):
        document = int(usable[int((i + 0.5) * len(usable) / picks)])
        excerpt = _least_copied(scores, document, length)
        text = tuple(scores.targets[excerpt.positions].tolist())
        if text not in seen:
            seen.add(text)
            excerpts.append(excerpt)
    return sorted(excerpts, key=lambda excerpt: excerpt.copied)


def document_positions(scores: StreamScores, document: int) -> Tensor:
    """(m,) int64: the targets of a document, without the mark after it."""
    return torch.nonzero((scores.document_ids == document) & ~scores.ends_document)[:, 0]


def _least_copied(scores: StreamScores, document: int, length: int) -> Excerpt:
    """Of several windows the one with the fewest copied tokens; of equals the middle one."""
    positions = document_positions(scores, document)
    runs = copied_runs(select(scores, positions), PHRASE) > 0
    last = max(0, len(positions) - length)
    middle = last // 2
    starts = sorted({middle, *(round(i * last / (_STARTS - 1)) for i in range(_STARTS))})
    shares = {start: float(runs[start : start + length].double().mean()) for start in starts}
    best = min(starts, key=lambda start: (shares[start], abs(start - middle)))
    return Excerpt(document, positions[best : best + length], shares[best])


def select(scores: StreamScores, positions: Tensor) -> StreamScores:
    """The scores of some positions, without what is kept by document."""
    names = ("log_p_lm", "targets", "document_ids", "ends_document", "distances", "tokens")
    parts = {name: getattr(scores, name)[positions] for name in (*names, "indices")}
    return type(scores)(**parts)


def telling_token(texts: Sequence[str], gains: Tensor, runs: Tensor) -> int:
    """Where an excerpt is opened: at a word, no copy, that gains more than nine in ten do.

    A page opened at the largest gain of all would show a copy, or an accident; at a part of a word,
    nothing that a reader knows.
    """
    words = [i for i, text in enumerate(texts) if text.strip().isalpha() and len(text.strip()) > 2]
    new = [i for i in words if runs[i] == 0]
    after = [*(text[:1] for text in texts[1:]), ""]
    whole = [i for i in new if texts[i][0].isspace() and not after[i].isalpha()]
    chosen = whole or new or words or list(range(len(texts)))
    order = sorted(chosen, key=lambda i: float(gains[i]))
    return order[int(0.9 * (len(order) - 1))]
