"""Text that the datastore holds to the letter, as the neighbors of its tokens show it.

Where a neighbor of one token is followed, row for row, by neighbors of the next tokens that all
stand for the right token, the text there is a copy. Licences and headers are, and a mixture is
certain of them; that says little about other text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from knnext.evaluation.scores import StreamScores

#: Tokens on end that make a copy: shorter runs are how people write.
SHORTEST_COPY = 16
#: Neighbors looked at; a copied token's row is among the nearest.
_NEAREST = 32


def copied_runs(scores: StreamScores, shortest: int = SHORTEST_COPY) -> Tensor:
    """(n,) int64: of how many copied tokens on end each target is one, 0 where of none.

    Args:
        scores: of consecutive targets, with `indices`.
        shortest: tokens that make a run.
    """
    assert scores.indices is not None
    runs = torch.zeros(scores.num_tokens, dtype=torch.int64, device="cpu")
    right = scores.tokens[:, :_NEAREST] == scores.targets[:, None]
    lengths: dict[int, int] = {}  # of the run that ends in a row
    longest: list[int] = []
    for rows, kept in zip(scores.indices[:, :_NEAREST], right, strict=True):
        lengths = {row: lengths.get(row - 1, 0) + 1 for row in rows[kept].tolist()}
        longest.append(max(lengths.values(), default=0))
    for i, length in enumerate(longest):
        if length >= shortest:
            run = runs[i + 1 - length : i + 1]
            run.clamp_(min=length)
    return _whole(runs)


def _whole(runs: Tensor) -> Tensor:
    """Each token of a run with the length of the whole of it."""
    values = runs.tolist()
    for i in range(len(values) - 2, -1, -1):
        if values[i] and values[i + 1] > values[i]:
            values[i] = values[i + 1]
    return torch.tensor(values, dtype=torch.int64, device="cpu")
