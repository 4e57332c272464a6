"""What a rank's queries may find, as it travels to a shard: of its rows alone, as whole numbers.

Runs of rows travel as runs, a mask as a bit a row, each once however many queries share it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from knnext.index.queries import QueryGroup
from knnext.index.row_set import Masked, RowSet, Runs

_KEPT, _LEFT_OUT, _BITS = 0, 1, 2
_WORD_BITS = 64


def labels_of(groups: Sequence[QueryGroup], num_queries: int) -> Tensor:
    """(Q,) int64, the group of each query."""
    found = torch.zeros(num_queries, dtype=torch.int64, device="cpu")
    for number, group in enumerate(groups):
        if group.queries is not None:
            found[group.queries] = number
    return found


def pack(groups: Sequence[QueryGroup], start: int, stop: int) -> Tensor:
    """(n,) int64: what the groups may find of the rows [start, stop)."""
    parts: list[Runs | Masked] = []
    number: dict[int, int] = {}
    members: list[int] = [len(groups)]
    for group in groups:
        for part in group.kept.parts:
            if id(part) not in number:
                number[id(part)] = len(parts)
                parts.append(part)
        members += [len(group.kept.parts), *(number[id(part)] for part in group.kept.parts)]
    words = [_words(part, start, stop) for part in parts]
    head = [len(parts), *(n for kind, data in words for n in (kind, len(data))), *members]
    return torch.from_numpy(np.concatenate([np.array(head, np.int64), *(d for _, d in words)]))


def unpack(words: Tensor, num_rows: int) -> list[RowSet]:
    """The groups' sets, of rows counted from the shard's first."""
    data = words.numpy()
    count = int(data[0])
    kinds = data[1 : 1 + 2 * count].reshape(count, 2).tolist()
    at = 1 + 2 * count
    members = []
    num_groups = int(data[at])
    at += 1
    for _ in range(num_groups):
        size = int(data[at])
        members.append(data[at + 1 : at + 1 + size].tolist())
        at += 1 + size
    parts: list[Runs | Masked] = []
    for kind, size in kinds:
        own = data[at : at + size]
        at += size
        if kind == _BITS:
            bits = np.unpackbits(own.view(np.uint8), bitorder="little", count=num_rows)
            parts.append(Masked(bits.astype(bool)))
        else:
            starts, stops = own.reshape(2, -1)
            parts.append(Runs(starts, stops, kind == _KEPT))
    return [RowSet([parts[number] for number in own]) for own in members]


def _words(part: Runs | Masked, start: int, stop: int) -> tuple[int, np.ndarray]:
    if isinstance(part, Runs):
        first = int(np.searchsorted(part.stops, start, side="right"))
        last = int(np.searchsorted(part.starts, stop, side="left"))
        if 2 * (last - first) * _WORD_BITS <= stop - start or first >= last:
            inside = slice(first, max(first, last))
            starts = np.maximum(part.starts[inside], start) - start
            stops = np.minimum(part.stops[inside], stop) - start
            return (_KEPT if part.keep else _LEFT_OUT), np.concatenate([starts, stops])
    answer = part.window(start, stop)
    mask = np.full(stop - start, answer) if isinstance(answer, bool) else answer
    room = np.zeros(-(-(stop - start) // _WORD_BITS) * 8, dtype=np.uint8)
    bits = np.packbits(mask, bitorder="little")
    room[: len(bits)] = bits
    return _BITS, room.view(np.int64)
