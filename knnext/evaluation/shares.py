"""How several ranks score one text: which positions are whose, and how all come to have all.

Positions are cut where a batch of windows ends, so that every forward pass is one that a single
process would do, and its floats are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from knnext.evaluation.spill import release, row_pieces
from knnext.index.base import Index
from knnext.index.sharded import ShardedIndex
from knnext.ranks import Ranks

if TYPE_CHECKING:
    from knnext.corpus import TokenizedDocuments


class Shares:
    """The positions `[first, last)` of each rank; all of them, of a process alone.

    Args:
        ranks: that score the text together.
        ends: ascending positions at which it may be cut; the last is the number of all.
    """

    def __init__(self, ranks: Ranks, ends: np.ndarray) -> None:
        self.ranks = ranks
        count = int(ends[-1])
        wanted = [rank * count // ranks.size for rank in range(1, ranks.size)]
        cuts = [0, *(int(cut) for cut in ends[np.searchsorted(ends, wanted)]), count]
        self.rows = list(pairwise(cuts))

    @property
    def mine(self) -> tuple[int, int]:
        return self.rows[self.ranks.rank]

    def most_pieces(self, size: int) -> int:
        """Pieces of at most `size` positions that the rank with most of them has."""
        return max(-(-(last - first) // size) for first, last in self.rows)

    def complete(
        self,
        tensors: Iterable[Tensor | None],
        row: Callable[[int], int] = lambda position: position,
    ) -> None:
        """Fill the rows of the other ranks, (all rows, ...), from those who have them.

        `row` tells which row comes first of those at a position or behind it.
        """
        owned = [(row(first), row(last)) for first, last in self.rows]
        for tensor in tensors if self.ranks.size > 1 else ():
            if tensor is None or not len(tensor):
                continue
            most = max(last - first for first, last in owned)
            for piece in row_pieces(most, tensor[:1].nbytes):
                parts = [
                    tensor[min(first + piece.start, last) : min(first + piece.stop, last)]
                    for first, last in owned
                ]
                self.ranks.exchange(
                    [(peer, parts[self.ranks.rank]) for peer in self.ranks.others],
                    [(peer, parts[peer]) for peer in self.ranks.others],
                ).wait()
                release(tensor)

    def collect(self, mine: Tensor, whole: Callable[[int], Tensor]) -> Tensor:
        """The rows of all ranks on the first one, from each those of its own share.

        Args:
            mine: this rank's, (its positions, ...).
            whole: makes room for so many.

        Returns:
            All of them on the first rank, and what was given on the others.
        """
        if self.ranks.size == 1:
            return mine
        if self.ranks.rank:
            for piece in row_pieces(len(mine), mine[:1].nbytes):
                self.ranks.exchange([(0, mine[piece])], []).wait()
                release(mine)
            return mine
        found = whole(self.rows[-1][1])
        found[slice(*self.rows[0])] = mine
        release(found, mine)
        for peer, (first, last) in enumerate(self.rows[1:], 1):
            theirs = found[first:last]
            for piece in row_pieces(last - first, found[:1].nbytes):
                self.ranks.exchange([], [(peer, theirs[piece])]).wait()
                release(found)
        return found


def ranks_among(ranks: Ranks | None, indexes: Iterable[Index]) -> Ranks:
    """The ranks given, else those of the indexes, else the process alone.

    ValueError where the indexes are divided among different groups.
    """
    found = {id(one.ranks.group): one.ranks for one in indexes if isinstance(one, ShardedIndex)}
    if ranks is not None:
        found[id(ranks.group)] = ranks
    if len(found) > 1:
        raise ValueError("indexes that are searched together must be of the same ranks")
    return next(iter(found.values()), Ranks())


def shares_of(ranks: Ranks, tokenized: TokenizedDocuments, windows: dict[str, Any]) -> Shares:
    """The shares of a text that is read in `windows`, arguments of `hidden_states`."""
    from knnext.lm.hidden_states import batch_ends

    ends = batch_ends(
        len(tokenized.tokens),
        windows["block_size"],
        windows["stride"],
        windows["batch_size"],
        tokenized.document_offsets if windows["separate_documents"] else None,
        bool(windows.get("full_last_window")),
    )
    return Shares(ranks, ends)
