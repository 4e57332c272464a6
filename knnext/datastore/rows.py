"""Rows of a sharded array on disk, read as torch tensors without loading the array."""

from __future__ import annotations

import functools
import itertools
import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.datastore.files import map_file
from knnext.datastore.kept import KeptRows

# A mapping holds a file descriptor; a datastore of thousands of shards must not use them all up.
_MAPPED_SHARDS = 128
# Rows between deleted ones that are worth a search of their own.
_LEAST_ON_END = 4096
# And so few that they are gathered row by row.
_FEW_ON_END = 64

Place: TypeAlias = tuple[int, int, Tensor | None]
RowIndex: TypeAlias = int | slice | Tensor | NDArray[np.int64] | Sequence[int]


# How the kernel reads what is touched first: with much of what lies around it, or that alone.
_USUAL, _SCATTERED = mmap.MADV_NORMAL, mmap.MADV_RANDOM


class _Mapped(NamedTuple):
    """A shard's file in memory."""

    buffer: mmap.mmap
    rows: Tensor


class ShardFiles:
    """``(path, rows)`` shards that hold one array of shape ``(sum of rows, *row_shape)``.

    Of ``kept`` rows there are only those, with the numbers that they have there.
    """

    def __init__(
        self,
        shards: Sequence[tuple[Path, int]],
        row_shape: tuple[int, ...],
        dtype: torch.dtype,
        kept: KeptRows | None = None,
    ) -> None:
        self.row_shape = row_shape
        self.dtype = dtype
        self.kept = kept
        self._file_bounds = np.cumsum([0, *(rows for _, rows in shards)], dtype=np.int64)
        # A closure over the shards, not over self: a cycle would keep files mapped.
        known = list(shards)
        row_bytes = math.prod(row_shape) * dtype.itemsize

        @functools.lru_cache(maxsize=_MAPPED_SHARDS)
        def mapped(shard: int) -> _Mapped:
            path, rows = known[shard]
            buffer = map_file(path, rows * row_bytes)
            return _Mapped(buffer, torch.frombuffer(buffer, dtype=dtype).view(rows, *row_shape))

        self._map = mapped
        self._known = known
        self._advised: dict[int, _Mapped] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the files' places; they are mapped again where rows are read."""
        known = [(path.absolute(), rows) for path, rows in self._known]
        return ShardFiles, (known, self.row_shape, self.dtype, self.kept)

    def __len__(self) -> int:
        return int(self._file_bounds[-1]) if self.kept is None else self.kept.count

    @functools.cached_property
    def bounds(self) -> NDArray[np.int64]:
        """Ascending rows between which each run lies on end in one file."""
        if self.kept is None:
            return self._file_bounds
        files = self.kept.before(torch.from_numpy(self._file_bounds)).numpy()
        return np.unique(np.concatenate([files, self.kept.firsts, [self.kept.count]]))

    def before(self, stored: Tensor) -> Tensor:
        """How many rows come before each of the rows ``stored`` in the files."""
        return stored if self.kept is None else self.kept.before(stored)

    def stored(self, rows: Tensor) -> Tensor:
        """Numbers of ``rows`` in the files."""
        return rows if self.kept is None else self.kept.stored(rows)

    def unmap(self) -> None:
        self._map.cache_clear()

    def _mapped(self, shard: int) -> Tensor:
        found = self._map(shard)
        if self._advised is not None and id(found) not in self._advised:
            self._advised[id(found)] = found
            found.buffer.madvise(_SCATTERED)
        return found.rows

    @contextmanager
    def scattered(self) -> Iterator[None]:
        """See :meth:`LazyRows.scattered`."""
        if self._advised is not None:
            yield
            return
        self._advised = {}
        try:
            yield
        finally:
            advised, self._advised = self._advised, None
            for mapped in advised.values():
                mapped.buffer.madvise(_USUAL)

    def read(self, first: int, last: int) -> Tensor:
        """Rows [first, last): a view of the file where they lie in one shard, else a copy."""
        runs = [(first, last)] if self.kept is None else self.kept.runs(first, last)
        if self.kept is not None:
            count = self.kept.num_runs(first, last)
            if count > 1 and _FEW_ON_END * count > last - first:
                return self.gather(torch.arange(first, last, device="cpu"))
        parts = [part for run in runs for part in self._parts(*run)]
        if not parts:
            return torch.empty((0, *self.row_shape), dtype=self.dtype, device="cpu")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, first: int, last: int) -> Iterator[Tensor]:
        """Views of the files that hold the stored rows [first, last)."""
        begin = int(np.searchsorted(self._file_bounds, first, side="right")) - 1
        end = int(np.searchsorted(self._file_bounds, last, side="left"))
        for shard in range(begin, end):
            start = int(self._file_bounds[shard])
            yield self._mapped(shard)[max(first - start, 0) : last - start]

    def gather(self, rows: Tensor) -> Tensor:
        """Copy the ``rows`` (n,) int64, read in ascending order so that the disk streams."""
        ordered, order = self.stored(rows).sort()
        cuts = torch.searchsorted(ordered, torch.from_numpy(self._file_bounds)).tolist()
        result = torch.empty((len(rows), *self.row_shape), dtype=self.dtype, device="cpu")
        for shard in range(len(self._file_bounds) - 1):
            begin, end = cuts[shard], cuts[shard + 1]
            if begin == end:
                continue
            local = ordered[begin:end] - int(self._file_bounds[shard])
            result.index_copy_(0, order[begin:end], self._mapped(shard).index_select(0, local))
        return result


class LazyRows:
    """An array-like over rows of :class:`ShardFiles`: a range of them, or a sorted selection.

    ``rows[a:b]`` gives rows a to b without a copy where they lie in one shard. ``rows[indices]``
    with int64 indices of any shape copies those rows, giving ``indices.shape + row shape``.
    Treat what you get as read-only: writing to it never reaches the file, but may be seen by
    later reads of this object.
    """

    def __init__(
        self, files: ShardFiles, first: int, count: int, selection: Tensor | None = None
    ) -> None:
        self._files = files
        self._first = first
        self._count = count
        self._selection = selection

    def __len__(self) -> int:
        return self._count

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._count, *self._files.row_shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._files.dtype

    def __repr__(self) -> str:
        return f"LazyRows(shape={self.shape}, dtype={self.dtype})"

    def __getitem__(self, index: RowIndex) -> Tensor:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            if step != 1:
                return self._gather(torch.arange(self._count, device="cpu")[index])
            return self._read(start, max(start, stop))
        rows = index if isinstance(index, Tensor) else torch.as_tensor(index, device="cpu")
        return self._gather(check_rows(rows, self._count))

    def range(self, first: int, last: int) -> LazyRows:
        """Rows [first, last) as an array of their own, still lazy."""
        if self._selection is None:
            return LazyRows(self._files, self._first + first, last - first)
        return LazyRows(self._files, 0, last - first, self._selection[first:last])

    def select(self, rows: Tensor) -> LazyRows:
        """The ascending ``rows`` (n,) int64 as an array of their own, still lazy."""
        return LazyRows(self._files, 0, len(rows), self._whole_rows(rows))

    @property
    def kept(self) -> KeptRows | None:
        """Which rows of the files there are, where some are deleted."""
        return self._files.kept

    @property
    def selected(self) -> bool:
        """Whether these are a selection, which is copied when it is read."""
        return self._selection is not None

    def pieces(self, rows: int) -> Iterator[tuple[int, int]]:
        """Ranges [first, last) of at most ``rows`` rows, in order, each a view of one file.

        Between deleted rows few rows may lie on end: such runs are joined, and copied when read.
        """
        cuts = [0]
        if self._selection is None:
            least = 1 if self._files.kept is None else min(rows, _LEAST_ON_END)
            for bound in self._local(torch.from_numpy(self._files.bounds)).tolist():
                if bound - cuts[-1] >= least:
                    cuts.append(bound)
        cuts.append(self._count)
        for start, stop in itertools.pairwise(cuts):
            for first in range(start, stop, rows):
                yield first, min(first + rows, stop)

    def scattered(self) -> AbstractContextManager[None]:
        """Within, what is touched is read from disk without what lies around it."""
        return self._files.scattered()

    def stored_rows(self, rows: Tensor) -> Tensor:
        """Row numbers in the files of ``rows`` of this view."""
        return self._files.stored(self._whole_rows(rows))

    def _whole_rows(self, rows: Tensor) -> Tensor:
        """Row numbers in the whole, of which this is a view."""
        return rows + self._first if self._selection is None else self._selection[rows]

    def place(self) -> Place:
        """Which of the whole's rows these are: the first, their number, those of a selection."""
        return self._first, self._count, self._selection

    def at(self, place: Place) -> LazyRows:
        """Those of the whole's rows, of which these are all, that another's `place` names."""
        return LazyRows(self._files, *place)

    def local(self, bounds: Tensor) -> Tensor:
        """How many of these rows lie before each of the ascending rows ``bounds`` of the files."""
        return self._local(self._files.before(bounds))

    def _local(self, bounds: Tensor) -> Tensor:
        if self._selection is None:
            return bounds.clamp(self._first, self._first + self._count) - self._first
        return torch.searchsorted(self._selection, bounds)

    def identity(self) -> bytes:
        """Bytes that differ between views of other rows."""
        if self._selection is None:
            return f"{self._first}+{self._count}".encode()
        return self._selection.numpy().tobytes()

    def unmap(self) -> None:
        """Let go of every mapping that no tensor uses."""
        self._files.unmap()

    def _read(self, first: int, last: int) -> Tensor:
        if self._selection is None:
            return self._files.read(self._first + first, self._first + last)
        return self._files.gather(self._selection[first:last])

    def _gather(self, rows: Tensor) -> Tensor:
        stored = self._whole_rows(rows.reshape(-1))
        return self._files.gather(stored).view((*rows.shape, *self._files.row_shape))


def check_rows(rows: Tensor, num_entries: int, *, padding: bool = False) -> Tensor:
    """``rows`` as int64 on the CPU; IndexError outside [0, num_entries).

    -1 is refused rather than read as the last row: in search results it is padding. ``padding``
    lets it through.
    """
    if rows.numel() == 0:
        return rows.to("cpu", torch.int64)
    if rows.dtype in (torch.bool, torch.uint64) or rows.is_floating_point() or rows.is_complex():
        raise TypeError(f"rows: got dtype {rows.dtype}, want int64 row numbers")
    rows = rows.to("cpu", torch.int64)
    low, high = (int(bound) for bound in rows.aminmax())
    if low < (-1 if padding else 0) or high >= num_entries:
        raise IndexError(
            f"rows: got row {low if low < 0 else high}, want rows in [0, {num_entries}); "
            "-1 is the padding of a search, mask it first"
        )
    return rows
