"""Sets of rows that a search may find, asked a run of rows at a time.

A set is made of parts, runs of rows and masks, and holds the rows that all of them have. It is
never written out as row numbers: documents stay a few runs, a mask a byte a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Range = tuple[int, int]
Rows: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
#: All of the rows that were asked for, none of them, or which.
Answer: TypeAlias = "bool | Mask"

#: Runs of at least so many kept rows are searched where they lie; shorter ones are gathered, since
#: each search of its own goes through the results so far once more.
LONG_RUN = 4096
_COUNTED_ROWS = 1 << 22
_FEW_RUNS = 64  # which are written one by one


@dataclass(frozen=True, eq=False)
class Runs:
    """Ascending, disjoint runs [start, stop) that are in the set, or with ``keep`` False not."""

    starts: Rows
    stops: Rows
    keep: bool = True

    @classmethod
    def of(cls, ranges: Sequence[Range] | Rows, *, keep: bool = True) -> Runs:
        """Of ranges in any order, also as (n, 2), which may be empty, touch and overlap."""
        found = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
        found = found[found[:, 0] < found[:, 1]]
        found = found[found[:, 0].argsort(kind="stable")]
        reach = np.maximum.accumulate(found[:, 1])
        first = np.ones(len(found), dtype=bool)
        first[1:] = found[1:, 0] > reach[:-1]
        last = np.append(first[1:], True)[: len(found)]
        return cls(found[first, 0], reach[last], keep)

    @classmethod
    def of_rows(cls, rows: Rows, *, keep: bool = True) -> Runs:
        """Of row numbers in any order, which may come twice."""
        rows = np.sort(rows)
        breaks = np.flatnonzero(np.diff(rows) > 1) + 1
        firsts, lasts = np.append(0, breaks), np.append(breaks, len(rows))
        if not len(rows):
            return cls(rows, rows, keep)
        return cls(rows[firsts], rows[lasts - 1] + 1, keep)

    def window(self, start: int, stop: int) -> Answer:
        first = int(np.searchsorted(self.stops, start, side="right"))
        last = int(np.searchsorted(self.starts, stop, side="left"))
        if first >= last:
            return not self.keep
        if self.starts[first] <= start and self.stops[first] >= stop:
            return self.keep
        starts = np.maximum(self.starts[first:last], start) - start
        stops = np.minimum(self.stops[first:last], stop) - start
        if last - first <= _FEW_RUNS:
            found = np.full(stop - start, not self.keep)
            for begin, end in zip(starts.tolist(), stops.tolist(), strict=True):
                found[begin:end] = self.keep
            return found
        steps = np.zeros(stop - start + 1, dtype=np.int8)
        steps[starts] += 1
        steps[stops] -= 1
        inside = steps[:-1].cumsum(dtype=np.int8) > 0
        return inside if self.keep else ~inside

    def among(self, rows: Rows) -> Mask:
        at = np.searchsorted(self.stops, rows, side="right")
        inside = np.append(self.starts, np.iinfo(np.int64).max)[at] <= rows
        found: Mask = inside if self.keep else ~inside
        return found


@dataclass(frozen=True, eq=False)
class Masked:
    """Rows by a byte each."""

    mask: Mask

    def window(self, start: int, stop: int) -> Answer:
        return self.mask[start:stop]

    def among(self, rows: Rows) -> Mask:
        found: Mask = self.mask[rows]
        return found


class RowSet:
    """The rows that all ``parts`` have; of none: every row."""

    def __init__(self, parts: Sequence[Runs | Masked] = ()) -> None:
        self.parts = tuple(parts)

    @property
    def everything(self) -> bool:
        """Whether no row was left out by anybody."""
        return not self.parts

    def window(self, start: int, stop: int) -> Answer:
        """Of the rows [start, stop): True for all, False for none, else a mask of them."""
        found: Answer = True
        for part in self.parts:
            answer = part.window(start, stop)
            if answer is False:
                return False
            if answer is not True:
                found = answer if found is True else found & answer
        return _settled(found)

    def among(self, rows: Rows) -> Answer:
        """Of ``rows`` (n,): True for all, False for none, else a mask of them."""
        found: Answer = True
        for part in self.parts:
            answer = part.among(rows)
            found = answer if found is True else found & answer
        return _settled(found)

    def count(self, num_rows: int) -> int:
        """How many of the rows [0, num_rows)."""
        return _count(self, num_rows)

    def mask(self, num_rows: int) -> Mask:
        """(num_rows,)"""
        found = np.empty(num_rows, dtype=bool)
        for start, stop in _windows(num_rows):
            found[start:stop] = self.window(start, stop)
        return found

    def numbers(self, num_rows: int) -> Iterator[Rows]:
        """Those of the rows [0, num_rows), ascending, some at a time."""
        for start, stop in _windows(num_rows):
            answer = self.window(start, stop)
            if answer is not False:
                some = np.arange(stop - start) if answer is True else np.flatnonzero(answer)
                yield some + start

    def runs(self, start: int, stop: int) -> Runs:
        """What it has of the rows [start, stop), counted from ``start``."""
        answer = self.window(start, stop)
        if isinstance(answer, bool):
            return Runs.of([(0, stop - start)] if answer else [])
        return Runs(*_edges(answer))

    def one_run(self) -> tuple[int, int, bool] | None:
        """(start, stop, keep) of a set that is one run, or all but one; None of any other."""
        if len(self.parts) != 1 or not isinstance(part := self.parts[0], Runs):
            return None
        if len(part.starts) != 1:
            return None
        return int(part.starts[0]), int(part.stops[0]), part.keep

    @cached_property
    def _bits(self) -> dict[int, NDArray[np.uint8]]:
        return {}

    def bits(self, num_rows: int) -> NDArray[np.uint8]:
        """The mask with a bit a row, the lowest of a byte first; made once."""
        if num_rows not in self._bits:
            self._bits[num_rows] = np.packbits(self.mask(num_rows), bitorder="little")
        return self._bits[num_rows]


ALL_ROWS = RowSet()


class AnyOf:
    """The rows that at least one of several sets has, as far as a search asks for it."""

    def __init__(self, sets: Sequence[RowSet]) -> None:
        self.sets = _united(sets)
        self.everything = any(one.everything for one in sets)

    def window(self, start: int, stop: int) -> Answer:
        found: Answer = False
        for one in self.sets:
            answer = one.window(start, stop)
            if answer is True:
                return True
            if answer is not False:
                found = answer if found is False else found | answer
                if found.all():
                    return True
        return _settled(found)

    def count(self, num_rows: int) -> int:
        return _count(self, num_rows)


def _united(sets: Sequence[RowSet]) -> list[RowSet]:
    """The same rows in fewer sets: of those that differ in their last runs alone one is made."""
    found: list[RowSet] = []
    same: dict[tuple[int, ...], list[RowSet]] = {}
    for one in sets:
        last = one.parts[-1] if one.parts else None
        if isinstance(last, Runs) and last.keep:
            same.setdefault(tuple(id(part) for part in one.parts[:-1]), []).append(one)
        else:
            found.append(one)
    for several in same.values():
        runs = [part for one in several if isinstance(part := one.parts[-1], Runs)]
        bounds = [np.stack([part.starts, part.stops], axis=1) for part in runs]
        found.append(RowSet([*several[0].parts[:-1], Runs.of(np.concatenate(bounds))]))
    return found


def split(mask: Mask, start: int) -> tuple[list[Range], Rows]:
    """The rows of a mask that begins at row ``start``: its long runs, and all others one by one."""
    starts, stops = _edges(mask)
    long = stops - starts >= LONG_RUN
    ranges = [
        (int(a) + start, int(b) + start) for a, b in zip(starts[long], stops[long], strict=True)
    ]
    if ranges:
        mask = mask.copy()
        for first, last in ranges:
            mask[first - start : last - start] = False
    return ranges, np.flatnonzero(mask).astype(np.int64) + start


def plan(
    wanted: RowSet | AnyOf, pieces: Iterable[Range], most: int
) -> Iterator[tuple[Range, Rows | None]]:
    """What must be read of ``pieces`` for all ``wanted`` rows: runs, and scattered rows together.

    Yields the range of a run with None, or the range that scattered rows lie in and these, at most
    ``most`` of them. Nothing else need be touched.
    """
    waiting: list[Rows] = []
    held = 0
    for start, stop in pieces:
        answer = wanted.window(start, stop)
        if answer is True:
            yield (start, stop), None
        elif answer is not False:
            ranges, rows = split(answer, start)
            for one in ranges:
                yield one, None
            waiting.append(rows)
            held += len(rows)
            while held >= most:
                rows = np.concatenate(waiting)
                yield _of_rows(rows[:most])
                waiting, held = [rows[most:]], held - most
    if held:
        yield _of_rows(np.concatenate(waiting))


def _of_rows(rows: Rows) -> tuple[Range, Rows]:
    return (int(rows[0]), int(rows[-1]) + 1), rows


def _edges(mask: Mask) -> tuple[Rows, Rows]:
    padded = np.zeros(len(mask) + 2, dtype=np.int8)
    padded[1:-1] = mask
    edges = np.flatnonzero(np.diff(padded)).astype(np.int64)
    return edges[::2], edges[1::2]


def _settled(answer: Answer) -> Answer:
    if isinstance(answer, bool):
        return answer
    if answer.all():
        return True
    return answer if answer.any() else False


def _count(rows: RowSet | AnyOf, num_rows: int) -> int:
    answers = ((b - a, rows.window(a, b)) for a, b in _windows(num_rows))
    return sum(n if answer is True else int(np.count_nonzero(answer)) for n, answer in answers)


def _windows(num_rows: int) -> Iterator[Range]:
    for start in range(0, num_rows, _COUNTED_ROWS):
        yield start, min(start + _COUNTED_ROWS, num_rows)
