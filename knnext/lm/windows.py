"""Which tokens of a stream a model reads together, and which of the states it then gives.

A document, or the whole stream as one, is read in windows of ``block_size`` tokens that advance by
``stride``. A window gives only the states that no earlier one gave: its last ``stride`` (the first
window: all), so past the first window each state has seen at least ``block_size - stride`` tokens
before it. All positions are given once, window by window in ascending order.

A stream is read batch by batch as it comes. Documents differ in length: there some batches' worth
of windows form a shelf, which is read by length so that little is filled up, and given when whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]

#: Batches of full windows that make a shelf, whose states are held until the last one is there.
_SHELF = 8


@dataclass(frozen=True)
class Windows:
    """The windows over a stream.

    Attributes:
        begins: (W,) int64, the first position that each reads.
        ends: (W,) int64, the position after the last that it reads and gives.
        gives: (W,) int64, the first position that it gives.
        heads: (W,) bool, whether it begins where its document does.
        block_size, stride: as they were asked for.
        mixed: whether lengths differ by more than at the stream's end.
    """

    begins: Int64Array
    ends: Int64Array
    gives: Int64Array
    heads: NDArray[np.bool_]
    block_size: int
    stride: int
    mixed: bool

    @classmethod
    def over(
        cls,
        length: int,
        block_size: int,
        stride: int,
        documents: Int64Array | None = None,
        *,
        full_last: bool = False,
    ) -> Windows:
        """Over a stream of ``length`` tokens, the last of which has no next token and no state.

        ``documents`` (n + 1,): where each begins, and ``length``; no window then crosses such a
        place. ``full_last``: the last window of a document, or of the stream, reaches back until it
        is full, so that with ``stride`` = ``block_size`` the windows are those of
        lm-evaluation-harness.
        """
        check_windows(block_size, stride)
        count = max(0, length - 1)
        bounds = np.asarray([0, count] if documents is None else documents, dtype=np.int64)
        bounds = np.unique(bounds.clip(0, count))
        first, last = bounds[:-1], bounds[1:]
        owner = first
        if full_last and documents is not None:
            owner, first, last = _without_marks(
                first, last, block_size, documents[documents < length]
            )
        windows = 1 + np.maximum(0, -((block_size - (last - first)) // stride))
        number = np.arange(windows.sum()) - np.repeat(windows.cumsum() - windows, windows)
        owner, first, end = (np.repeat(part, windows) for part in (owner, first, last))
        begins = first + number * stride
        ends = np.minimum(begins + block_size, end)
        gives = np.where(number == 0, first, begins - stride + block_size)
        if full_last:
            begins = np.where(ends == end, np.maximum(owner, end - block_size), begins)
        mixed = documents is not None
        return cls(begins, ends, gives, begins == owner, block_size, stride, mixed)

    def __len__(self) -> int:
        return len(self.begins)

    @property
    def num_read(self) -> int:
        """Tokens that the model reads, each as often as it is read."""
        return int((self.ends - self.begins).sum())

    @property
    def reads(self) -> float:
        """How often a token is read, on average."""
        given = int((self.ends - self.gives).sum())
        return self.num_read / given if given else 0.0

    def describe(self) -> str:
        """What is read, for people."""
        where = "each document alone, in windows" if self.mixed else "windows"
        return (
            f"{where} of up to {self.block_size:,} tokens, {self.stride:,} apart: the model reads "
            f"each token {self.reads:.2f} times"
        )

    def shelves(self, batch_size: int, *, most: int = _SHELF) -> Iterator[tuple[int, int]]:
        """Runs [first, last) of windows of which the states are given together, in order.

        Where lengths are mixed, of the tokens of ``most`` batches; else of one batch.
        """
        if not self.mixed:
            for first in range(0, len(self), batch_size):
                yield first, min(first + batch_size, len(self))
            return
        room = most * batch_size * self.block_size
        read = np.concatenate([[0], (self.ends - self.begins).cumsum()])
        first = 0
        while first < len(self):
            last = int(np.searchsorted(read, read[first] + room, side="right")) - 1
            yield first, max(last, first + 1)
            first = max(last, first + 1)

    def batches(
        self, shelf: tuple[int, int], batch_size: int, *, one_length: bool = False
    ) -> Iterator[Int64Array]:
        """The windows of each forward pass over a shelf; ``one_length``: none is to be filled up.

        A batch has no more cells than ``batch_size`` full windows.
        """
        chosen = np.arange(*shelf)
        lengths = (self.ends - self.begins)[chosen]
        if self.mixed or one_length:
            order = np.argsort(-lengths, kind="stable")
            chosen, lengths = chosen[order], lengths[order]
        cells = batch_size * self.block_size
        first = 0
        while first < len(chosen):
            most = batch_size if not self.mixed else max(1, cells // int(lengths[first]))
            last = min(first + most, len(chosen))
            if one_length:
                last = first + int((lengths[first:last] == lengths[first]).sum())
            yield chosen[first:last]
            first = last


def _without_marks(
    first: Int64Array, last: Int64Array, block_size: int, starts: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """(where the document begins, first, last) of stretches that are read in windows of their own.

    The state at a document's end, to which the next one's mark belongs, is apart in documents of
    more than one window, so that the last full window is that of the document's own tokens.
    """
    cut = (last - first > block_size) & np.isin(last, starts)
    owner = np.concatenate([first, first[cut]])
    begin = np.concatenate([first, last[cut] - 1])
    end = np.concatenate([np.where(cut, last - 1, last), last[cut]])
    order = np.argsort(begin, kind="stable")
    return owner[order], begin[order], end[order]


def check_windows(block_size: int, stride: int) -> None:
    """ValueError for windows that there cannot be."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride must be from 1 to block_size={block_size}, got {stride}")


def check_documents(documents: Any, length: int) -> Int64Array:
    """(n + 1,) int64 places that begin at 0, never fall and end at ``length``; else ValueError."""
    places = np.asarray(documents.cpu() if hasattr(documents, "cpu") else documents)
    good = places.ndim == 1 and len(places) > 0 and np.issubdtype(places.dtype, np.integer)
    if not good or places[0] != 0 or places[-1] != length or (np.diff(places) < 0).any():
        shown: Sequence[Any] | Any = places.tolist() if places.size <= 8 else places
        raise ValueError(
            f"separate_documents must be the places where documents begin, from 0, and at the end "
            f"the number of tokens, {length}; got {shown}"
        )
    return places.astype(np.int64)


def half_stride(block_size: int) -> int:
    """What an evaluation's windows advance by: each state has seen half a window at least."""
    return max(1, block_size // 2)


def build_stride(block_size: int) -> int:
    """What a build's windows advance by: each token is read at most 1.34 times."""
    return block_size - block_size // 4
