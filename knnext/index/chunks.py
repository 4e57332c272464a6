"""Keys that are searched at once: a run of a datastore's rows, or rows of it that were gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from knnext.index.queries import QueryGroup
from knnext.index.row_set import Answer, Mask, Rows, split
from knnext.ops import KeyCodes

#: Neighbors that a search of several groups asks for at most: so many GPUs find fast.
_MOST_ASKED = 2048
#: A search of its own for a group costs about what so many neighbors more cost in one for all.
_ROWS_A_GROUP = 32


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


def answer_of(chunk: Chunk, group: QueryGroup) -> Answer:
    """Of the rows of a chunk: True where the group may find all, False for none, else a mask."""
    if chunk.rows is None:
        return group.kept.window(chunk.start, chunk.stop)
    return group.kept.among(chunk.rows)


def those_together(
    groups: list[tuple[QueryGroup, int]], k: int
) -> tuple[list[QueryGroup], list[QueryGroup], int]:
    """Groups that one search serves best, the others, and how many rows one of the first lacks.

    ``groups`` come with the number of rows of a chunk that each leaves out.
    """
    most = min(_MOST_ASKED - k, _ROWS_A_GROUP * len(groups))
    together = [(group, lost) for group, lost in groups if lost <= most]
    if len(together) < 2:
        return [], [group for group, _ in groups], 0
    alone = [group for group, lost in groups if lost > most]
    return [group for group, _ in together], alone, max(lost for _, lost in together)


def labelled(groups: list[QueryGroup]) -> tuple[Tensor, Tensor]:
    """(n,) the queries of several groups, and the number of the group of each."""
    rows = [group.queries for group in groups if group.queries is not None]
    sizes = torch.tensor([len(one) for one in rows], dtype=torch.int64, device="cpu")
    return torch.cat(rows), torch.arange(len(rows), device="cpu").repeat_interleave(sizes)


def kept_by_each(rows: Tensor, owners: Tensor, groups: list[QueryGroup]) -> Tensor:
    """(n, m) row numbers, with -1 for those that the group of a query, (n,) ascending, leaves out.

    What is -1 already stays so.
    """
    found = rows.to("cpu", copy=True)
    numbers, counts = owners.unique_consecutive(return_counts=True)
    for number, part in zip(numbers.tolist(), found.split(counts.tolist()), strict=True):
        answer = groups[number].kept.among(part.numpy().reshape(-1))
        if answer is False:
            part.fill_(-1)
        elif answer is not True:
            part.masked_fill_(~torch.from_numpy(answer).view(part.shape), -1)
    return found.to(rows.device)


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
