"""The rows of a datastore that are not deleted, numbered without gaps: what every reader sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Range = tuple[int, int]


class KeptRows:
    """Runs of stored rows, between those that are ``deleted``: ascending, disjoint, not empty.

    Attributes:
        starts, stops: (n,) int64 stored rows of the runs.
        firsts: (n,) int64, the number that the first row of each run has now.
        count: rows that are left.
    """

    def __init__(self, num_stored: int, deleted: Sequence[Range]) -> None:
        bounds = np.array([0, *(row for run in deleted for row in run), num_stored], dtype=np.int64)
        runs = bounds.reshape(-1, 2)
        runs = runs[runs[:, 0] < runs[:, 1]]
        self.starts: NDArray[np.int64] = runs[:, 0].copy()
        self.stops: NDArray[np.int64] = runs[:, 1].copy()
        ends = np.cumsum(self.stops - self.starts, dtype=np.int64)
        self.firsts: NDArray[np.int64] = ends - (self.stops - self.starts)
        self.count: int = int(ends[-1]) if len(ends) else 0
        self.num_stored = num_stored

    def stored(self, rows: Tensor) -> Tensor:
        """Stored numbers of ``rows``, int64 of any shape; there must be such rows."""
        firsts, starts = torch.from_numpy(self.firsts), torch.from_numpy(self.starts)
        run = torch.searchsorted(firsts, rows, right=True) - 1
        return rows - firsts[run] + starts[run]

    def before(self, stored: Tensor) -> Tensor:
        """How many rows are left before each stored row, int64 of any shape: its own number now."""
        if not len(self.starts):
            return torch.zeros_like(stored)
        starts, stops = torch.from_numpy(self.starts), torch.from_numpy(self.stops)
        run = (torch.searchsorted(starts, stored, right=True) - 1).clamp_min(0)
        inside = torch.minimum(stored, stops[run]) - starts[run]
        return torch.from_numpy(self.firsts)[run] + inside.clamp_min(0)

    def num_runs(self, first: int, last: int) -> int:
        """In how many runs the rows [first, last) lie, of which there are some."""
        places = np.searchsorted(self.firsts, [first, last - 1], side="right")
        return int(places[1] - places[0]) + 1

    def runs(self, first: int, last: int) -> Iterator[Range]:
        """The stored runs that rows [first, last) lie in."""
        run = int(np.searchsorted(self.firsts, first, side="right")) - 1
        while first < last:
            start = int(self.starts[run]) + first - int(self.firsts[run])
            stop = min(int(self.stops[run]), start + last - first)
            yield start, stop
            first += stop - start
            run += 1


def joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Ascending and disjoint, of ranges in any order; those that are empty are left out."""
    found: list[Range] = []
    for start, stop in sorted(one for one in ranges if one[0] < one[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def holds(ranges: Sequence[Range], count: int) -> NDArray[np.bool_]:
    """(count,) whether each number lies in one of the ranges."""
    found = np.zeros(count, dtype=bool)
    for start, stop in ranges:
        found[start:stop] = True
    return found
