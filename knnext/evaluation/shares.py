"""How several ranks score one text: which positions are whose, and how all come to have all.

Positions are cut where a batch of windows ends, so that every forward pass is one that a single
process would do, and its floats are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor, nn

from knnext.evaluation.spill import release, row_pieces
from knnext.index.base import Index
from knnext.index.sharded import ShardedIndex
from knnext.ranks import Ranks


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

    def complete(self, tensors: Iterable[Tensor | None]) -> None:
        """Fill the rows of the other ranks, (all positions, ...), from those who have them."""
        for tensor in tensors if self.ranks.size > 1 else ():
            if tensor is None or not len(tensor):
                continue
            most = max(last - first for first, last in self.rows)
            for piece in row_pieces(most, tensor[:1].nbytes):
                parts = [
                    tensor[min(first + piece.start, last) : min(first + piece.stop, last)]
                    for first, last in self.rows
                ]
                self.ranks.exchange(
                    [(peer, parts[self.ranks.rank]) for peer in self.ranks.others],
                    [(peer, parts[peer]) for peer in self.ranks.others],
                ).wait()
                release(tensor)


def shares_of(
    ranks: Ranks | None,
    indexes: Iterable[Index],
    model: nn.Module,
    length: int,
    windows: dict[str, Any],
) -> Shares:
    """The shares of a text of `length` tokens: of the ranks given, else those of the indexes.

    ValueError where the indexes are divided among different groups.
    """
    from knnext.lm.hidden_states import batch_ends, default_block_size

    found = {id(one.ranks.group): one.ranks for one in indexes if isinstance(one, ShardedIndex)}
    if ranks is not None:
        found[id(ranks.group)] = ranks
    if len(found) > 1:
        raise ValueError("indexes that are searched together must be of the same ranks")
    block = windows["block_size"] or default_block_size(model)
    stride = windows["stride"] or max(1, block // 2)
    ends = batch_ends(length, block, stride, windows["batch_size"])
    return Shares(next(iter(found.values()), Ranks()), ends)
