"""The text behind a neighbor: the datastore's values around its row, decoded.

Values are the token stream that the datastore was built from, so a row's context is the rows
before it and its continuation the rows after it, within its document.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from knnext.datastore import Datastore

_ROWS_PER_READ = 65_536
#: What may be a part of a word; a text that is nothing else is left as it is.
_HALF_WORD_AT_HEAD, _HALF_WORD_AT_TAIL = re.compile(r"^\w+(?=\W)"), re.compile(r"(?<=\W)\w+$")


@dataclass(frozen=True)
class Span:
    """One row as text.

    Attributes:
        row: row of the datastore.
        before: the text that led to the token.
        token: the token that the row stands for.
        after: the text that followed it.
        document: name of the document, "" where the datastore keeps none.
        cut_before, cut_after: whether the document has more text on that side.
    """

    row: int
    before: str
    token: str
    after: str
    document: str
    cut_before: bool = False
    cut_after: bool = False

    @property
    def excerpt(self) -> tuple[str, str]:
        """The text before and after for a reader: "…" where it was cut, and there whole words."""
        return excerpt_head(self.before, self.cut_before), excerpt_tail(self.after, self.cut_after)


def excerpt_head(text: str, cut: bool) -> str:
    """A text whose beginning was cut off where it fell: after a "…", and from the next word on."""
    return "…" + _HALF_WORD_AT_HEAD.sub("", text) if cut else text


def excerpt_tail(text: str, cut: bool) -> str:
    """The same for a cut end."""
    return _HALF_WORD_AT_TAIL.sub("", text) + "…" if cut else text


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
    cut_before = (rows - before > first).tolist()
    cut_after = (rows + after + 1 < last).tolist()
    return [
        Span(row, head, token, tail, document, *cut)
        for row, (head, token, tail), document, cut in zip(
            rows.tolist(),
            zip(texts[::3], texts[1::3], texts[2::3], strict=True),
            documents,
            zip(cut_before, cut_after, strict=True),
            strict=True,
        )
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
