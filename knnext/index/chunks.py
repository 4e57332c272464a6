"""Keys that are searched at once: a run of a datastore's rows, or rows of it that were gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from knnext.index.queries import QueryGroup
from knnext.index.row_set import Mask, Rows, split
from knnext.ops import KeyCodes


class Chunk(NamedTuple):
    """Keys of the rows from `start` on, with their codes, or the squared norms that "l2" wants.

    With `rows` they are of these rows, gathered, ascending.
    """

    start: int
    keys: Tensor
    sqnorms: Tensor | None
    codes: KeyCodes | None = None
    rows: Rows | None = None

    @property
    def stop(self) -> int:
        return self.start + self.keys.shape[0]


def queries_of(groups: list[QueryGroup], everyone: bool) -> Tensor | None:
    """Rows of all the groups' queries, or None where that is every query."""
    rows = [g.queries for g in groups if g.queries is not None]
    return None if everyone or not rows else torch.cat(rows)


def slice_of(chunk: Chunk, start: int, stop: int) -> Chunk:
    part = slice(start - chunk.start, stop - chunk.start)
    sqnorms = None if chunk.sqnorms is None else chunk.sqnorms[part]
    return Chunk(
        start, chunk.keys[part], sqnorms, None if chunk.codes is None else chunk.codes[part]
    )


def parts_of(chunk: Chunk, mask: Mask) -> Iterator[Chunk]:
    """What a mask keeps of a chunk: its long runs as they lie, the others gathered."""
    if chunk.rows is None:
        ranges, rows = split(mask, chunk.start)
        for start, stop in ranges:
            yield slice_of(chunk, start, stop)
        places = rows - chunk.start
    else:
        places, rows = np.flatnonzero(mask), chunk.rows[mask]
    if len(rows):
        at = torch.from_numpy(places).to(chunk.keys.device)
        sqnorms = None if chunk.sqnorms is None else chunk.sqnorms[at]
        yield Chunk(chunk.start, chunk.keys[at], sqnorms, None, rows)
