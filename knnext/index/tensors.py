"""Keys and values in memory, in the place of a datastore: what an index of plain tensors searches.

The first keys are not copied where they need not be: those of a float dtype that lie in one piece
are searched where they are. What is added later is copied, into blocks of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.datastore.rows import check_rows
from knnext.ops import KeyCodes, encode_keys, mean_key

#: Keys as the ops take them; others are rounded to float32.
KEY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHECKED_ROWS = 1 << 16  # at once
_CENTER_ROWS = 1 << 14

ArrayLike = Tensor | NDArray[Any]


class _Meta(NamedTuple):
    """What a search asks of a datastore's meta."""

    row_bytes: int
    num_entries: int


class BlockRows:
    """An array of rows in blocks, like a datastore's: ``rows[a:b]``, ``rows[indices]``."""

    selected = False  # a slice within a block is no copy

    def __init__(self, blocks: list[Tensor]) -> None:
        self._blocks = blocks
        self._bounds = np.cumsum([0, *(len(block) for block in blocks)])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._blocks[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self._blocks[0].dtype

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self[torch.arange(start, stop, step, device="cpu")]
            return self._read(start, max(start, stop))
        rows = check_rows(index, len(self))
        whole = self._read(0, len(self)) if len(self._blocks) == 1 else None
        if whole is not None:
            return whole[rows.to(whole.device)]
        found = torch.empty((*rows.shape, *self.shape[1:]), dtype=self.dtype, device="cpu")
        for number, block in enumerate(self._blocks):
            first, last = self._bounds[number : number + 2].tolist()
            here = (rows >= first) & (rows < last)
            found[here] = block[(rows[here] - first).to(block.device)].to(found.device)
        return found.to(self._blocks[0].device)

    def pieces(self, rows: int) -> Iterator[tuple[int, int]]:
        """Ranges of at most ``rows`` rows, each within one block."""
        for first, last in zip(self._bounds[:-1].tolist(), self._bounds[1:].tolist(), strict=True):
            for start in range(first, last, rows):
                yield start, min(start + rows, last)

    def scattered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _read(self, first: int, last: int) -> Tensor:
        parts = []
        for number, block in enumerate(self._blocks):
            start, stop = self._bounds[number : number + 2].tolist()
            if first < stop and start < last:
                parts.append(block[max(first - start, 0) : last - start])
        if not parts:
            return self._blocks[0][:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class DocumentBounds:
    """Row bounds by document id, as a datastore's ``document_offsets``: found when they are asked
    for, as ids may be far larger than there are rows."""

    def __init__(self, blocks: list[Tensor]) -> None:
        self._blocks = blocks
        self._documents: Tensor | None = None

    def numel(self) -> int:
        last = next((int(block[-1]) for block in reversed(self._blocks) if len(block)), -1)
        return last + 2

    def __getitem__(self, document: int | Tensor) -> Tensor:
        if self._documents is None:
            self._documents = torch.cat(self._blocks)
        return torch.searchsorted(self._documents, document)


class TensorStore:
    """Keys (N, D), and perhaps values (N,) int32 and documents, as an index reads them.

    ``metric`` "cosine" keeps the keys normalised, by which alone they are copied; a row of zeros
    stays one.
    """

    path = "tensors in memory"
    key_layer: str | None = None
    vocab_size: int | None = None

    def __init__(
        self,
        keys: ArrayLike,
        values: ArrayLike | None,
        metric: str,
        documents: ArrayLike | None = None,
    ) -> None:
        self.metric = metric
        first = self._prepared(keys, None)
        self.dim, self.dtype, self.device = first.shape[1], first.dtype, first.device
        self._keys: list[Tensor] = [first]
        self._values: list[Tensor] = []
        self._documents: list[Tensor] = []
        self._has = (values is not None, documents is not None)
        self._append(len(first), values, documents)

    def add(self, keys: ArrayLike, values: ArrayLike | None, documents: ArrayLike | None) -> Tensor:
        """The rows as they were added, (n, D) in the dtype of those before."""
        prepared = self._prepared(keys, self.dim).to(self.device, self.dtype)
        if prepared.data_ptr() == as_tensor("keys", keys).data_ptr():
            prepared = prepared.clone()  # whoever adds from one buffer writes to it again
        _check_finite(prepared)  # of another dtype they may have been larger than this one's
        self._append(len(prepared), values, documents)
        if len(prepared):
            self._keys.append(prepared)
            self._join_small_blocks()
        return prepared

    @property
    def given_rows(self) -> int:
        """Rows of the first block, which stays as it was given."""
        return len(self._keys[0])

    def _join_small_blocks(self) -> None:
        """Of what was added in many pieces few blocks are made; each row moves seldom."""
        while len(self._keys) > 2 and len(self._keys[-2]) <= 2 * len(self._keys[-1]):
            self._keys[-2:] = [torch.cat(self._keys[-2:])]

    def __len__(self) -> int:
        return self.num_entries

    @property
    def num_entries(self) -> int:
        return sum(len(block) for block in self._keys)

    @property
    def meta(self) -> _Meta:
        return _Meta(self.dim * self.dtype.itemsize, self.num_entries)

    @property
    def keys(self) -> BlockRows:
        return BlockRows(self._keys)

    @property
    def has_values(self) -> bool:
        return self._has[0]

    @property
    def values(self) -> BlockRows:
        """ValueError where none were given."""
        if not self.has_values:
            raise ValueError(
                "this index has no values, which are its rows' tokens: make it by "
                "from_tensors(keys, values)"
            )
        return BlockRows(self._values)

    @property
    def document_offsets(self) -> DocumentBounds:
        return DocumentBounds(self._documents)

    @property
    def fingerprint(self) -> str:
        return f"memory-{id(self):x}-{self.num_entries}"

    def iter_chunks(self, rows: int) -> Iterator[tuple[int, Tensor, None]]:
        keys = self.keys
        for first, last in keys.pieces(rows):
            yield first, keys[first:last], None

    def encode(self, rows: Tensor | None = None, codes: KeyCodes | None = None) -> KeyCodes:
        """Codes of all keys; or ``codes`` with those of the newest ``rows`` behind them."""
        if rows is not None and codes is not None:
            return KeyCodes.cat([codes, encode_keys(rows, codes.center)])
        some = self.keys[0 : min(_CENTER_ROWS, self.num_entries)]
        center = (
            mean_key(some)
            if len(some)
            else torch.zeros(self.dim, dtype=torch.float32, device="cpu")
        )
        return KeyCodes.cat([encode_keys(block, center) for block in self._keys])

    def _prepared(self, keys: ArrayLike, dim: int | None) -> Tensor:
        tensor = as_tensor("keys", keys)
        if tensor.ndim != 2 or tensor.shape[1] < 1 or dim not in (None, tensor.shape[1]):
            wanted = "(N, D)" if dim is None else f"(n, {dim}) like those before"
            raise ValueError(f"keys must be {wanted}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"keys must be floating point, got {tensor.dtype}")
        if tensor.dtype not in KEY_DTYPES:
            tensor = tensor.float()
        _check_finite(tensor)
        return normalised(tensor) if self.metric == "cosine" else tensor.contiguous()

    def _append(self, rows: int, values: ArrayLike | None, documents: ArrayLike | None) -> None:
        """Checks both before either is kept."""
        for name, given, has in zip(
            ("values", "documents"), (values, documents), self._has, strict=True
        ):
            if (given is not None) != has:
                verb = "needs" if has else "has no"
                raise ValueError(f"this index {verb} {name}: give them for all rows, or for none")
        kept = None if values is None else _integers("values", values, rows)
        of = None if documents is None else _integers("documents", documents, rows)
        if of is not None and len(of):
            last = next((int(d[-1]) for d in reversed(self._documents) if len(d)), 0)
            if int(of[0]) < last or bool((of[1:] < of[:-1]).any()):
                raise ValueError("documents must be ids that never go back, one for each row")
            self._documents.append(of.cpu())
        if kept is not None:
            self._values.append(kept.to(torch.int32))


def tensor_store(store: Any) -> TensorStore | None:
    """The store, where it is one of tensors and not a datastore."""
    return store if isinstance(store, TensorStore) else None


def as_tensor(name: str, given: Any) -> Tensor:
    """A tensor as it is, detached; numpy's arrays without a copy."""
    if isinstance(given, Tensor):
        return given.detach()
    if isinstance(given, np.ndarray):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of arrays that may not be written to
            return torch.from_numpy(given.copy() if min(given.strides, default=0) < 0 else given)
    raise TypeError(f"{name} must be a tensor or a numpy array, got {type(given).__name__}")


def normalised(rows: Tensor) -> Tensor:
    """(n, D) rows of length 1 in their own dtype, by a norm in float32; zeros stay zeros."""
    found = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    for first in range(0, len(rows), _CHECKED_ROWS):
        part = rows[first : first + _CHECKED_ROWS].float()
        # Of tiny or huge rows the squares would leave float32.
        largest = part.abs().amax(dim=1, keepdim=True)
        part = torch.where(largest > 0, part / largest, part)
        norms = part.norm(dim=1, keepdim=True)
        found[first : first + _CHECKED_ROWS] = torch.where(norms > 0, part / norms, part)
    return found


def _check_finite(keys: Tensor) -> None:
    for first in range(0, len(keys), _CHECKED_ROWS):
        good = keys[first : first + _CHECKED_ROWS].isfinite().all(dim=1)
        if not bool(good.all()):
            row = first + int((~good).int().argmax())
            raise ValueError(f"keys must be finite numbers, and row {row} is not")


def _integers(name: str, given: ArrayLike, rows: int) -> Tensor:
    tensor = as_tensor(name, given)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {tensor.dtype}")
    tensor = tensor.to(torch.int64, copy=True)  # not all that is asked below is there for uint16
    if tensor.shape != (rows,):
        raise ValueError(f"{name} must be ({rows},), one for each key, got {tuple(tensor.shape)}")
    if rows and not 0 <= int(tensor.min()) <= int(tensor.max()) < 2**31:
        raise ValueError(
            f"{name} must lie in [0, {2**31}), got {int(tensor.min())} to {int(tensor.max())}"
        )
    return tensor
