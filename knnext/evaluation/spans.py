"""The text behind a neighbor: the datastore's values around its row, decoded.

Values are the token stream that the datastore was built from, so a row's context is the rows
before it and its continuation the rows after it, within its document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from knnext.datastore import Datastore

_ROWS_PER_READ = 65_536


@dataclass(frozen=True)
class Span:
    """One row as text.

    Attributes:
        row: row of the datastore.
        before: the text that led to the token.
        token: the token that the row stands for.
        after: the text that followed it.
        document: name of the document, "" where the datastore keeps none.
    """

    row: int
    before: str
    token: str
    after: str
    document: str


def neighbor_spans(
    datastore: Datastore, tokenizer: Any, rows: Tensor, *, before: int = 16, after: int = 8
) -> list[Span]:
    """The texts of datastore rows, in the order given.

    Args:
        datastore: open for reading. Of a subsample the values have gaps, and so has the text.
        tokenizer: the one the datastore was built with.
        rows: (n,) int64, each in [0, num_entries).
        before, after: tokens shown on each side, fewer at the ends of the document.
    """
    spans: list[Span] = []
    for part in rows.split(_ROWS_PER_READ):
        spans += _spans(datastore, tokenizer, part, before, after)
    return spans


def _spans(
    datastore: Datastore, tokenizer: Any, rows: Tensor, before: int, after: int
) -> list[Span]:
    first, last, documents = _bounds(datastore, rows)
    window = rows[:, None] + torch.arange(-before, after + 1, device="cpu")
    inside = (window >= first[:, None]) & (window < last[:, None])
    # A row outside its document is read as the row itself and dropped below.
    values = datastore.values[torch.where(inside, window, rows[:, None])]
    sides: list[list[int]] = []
    for line, kept in zip(values.tolist(), inside.tolist(), strict=True):
        own = [value if keep else None for value, keep in zip(line, kept, strict=True)]
        for part in (own[:before], own[before : before + 1], own[before + 1 :]):
            sides.append([value for value in part if value is not None])
    texts = decode_all(tokenizer, sides)
    return [
        Span(row, texts[3 * i], texts[3 * i + 1], texts[3 * i + 2], documents[i])
        for i, row in enumerate(rows.tolist())
    ]


def _bounds(datastore: Datastore, rows: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """First and last row (exclusive) of each row's document, and its name."""
    if datastore.num_documents == 0:
        low = torch.zeros_like(rows)
        return low, low + datastore.num_entries, [""] * len(rows)
    ids = datastore.document_of(rows)
    offsets, names = datastore.document_offsets, datastore.document_names
    return offsets[ids], offsets[ids + 1], [names[i] for i in ids.tolist()]


def decode_all(tokenizer: Any, sequences: Sequence[Sequence[int]]) -> list[str]:
    """The text of each token sequence, nothing skipped and nothing tidied."""
    return [
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if ids
        else ""
        for ids in sequences
    ]
