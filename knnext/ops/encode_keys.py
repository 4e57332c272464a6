"""Eight-bit codes of keys, for an exact search at the price of a product of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks
from knnext.ops._derivatives import as_rows, call, one_by_one, register_no_derivative

_CENTER_BYTES = 64 << 20  # of float32 rows held at once


@dataclass(frozen=True)
class KeyCodes:
    """Codes of N keys of width D: one byte a dimension, and 12 a row.

    With R the rotation that D alone fixes, ``R (key - center)`` lies within ``error`` of
    ``scale * code``. Slices like the keys (``codes[a:b]``), and is joined as they are
    (:meth:`cat`).

    Attributes:
        codes: (N, D) int8, in [-127, 127].
        stats: (N, 3) float32: scale, error (an upper bound, always), and the norm of scale * code.
            A row holding NaN or infinity has (0, 0, inf); one that no code can bound, an error of
            inf.
        center: (D,) float32, the origin that the keys were moved to.
    """

    codes: Tensor
    stats: Tensor
    center: Tensor

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def dim(self) -> int:
        return self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.stats.nbytes + self.center.nbytes

    def __getitem__(self, rows: slice | Tensor) -> KeyCodes:
        """The codes of ``keys[rows]``."""
        if not (isinstance(rows, slice) or (isinstance(rows, Tensor) and rows.dim() == 1)):
            raise TypeError(f"KeyCodes take a slice or a tensor of rows, got {rows!r}")
        return KeyCodes(self.codes[rows], self.stats[rows], self.center)

    def to(self, *args: Any, **kwargs: Any) -> KeyCodes:
        """On another device; as ``Tensor.to``, with no dtype."""
        parts = (t.to(*args, **kwargs) for t in (self.codes, self.stats, self.center))
        moved = KeyCodes(*parts)
        if moved.codes.dtype != torch.int8 or moved.stats.dtype != torch.float32:
            raise TypeError("KeyCodes keep their dtypes: give to() a device alone")
        return moved

    def pin_memory(self) -> KeyCodes:
        return KeyCodes(self.codes.pin_memory(), self.stats.pin_memory(), self.center.pin_memory())

    @staticmethod
    def cat(parts: Sequence[KeyCodes]) -> KeyCodes:
        """The codes of ``torch.cat`` of the keys; all must have been made with one center."""
        if not parts:
            raise ValueError("KeyCodes.cat() needs at least one part")
        center = parts[0].center
        if any(not torch.equal(part.center, center) for part in parts[1:]):
            raise ValueError(
                "KeyCodes.cat() joins codes of one center; these were made with several"
            )
        codes = torch.cat([part.codes for part in parts])
        return KeyCodes(codes, torch.cat([part.stats for part in parts]), center)


def encode_keys(keys: Tensor, center: Tensor | None = None) -> KeyCodes:
    """Codes of the keys, for ``knn_search(..., codes=codes)``: made once, used in every search.

    Args:
        keys: (N, D) float16, bfloat16 or float32.
        center: (D,) the point that codes count from; by default :func:`mean_key` of the keys. Any
            point is right: the nearer to the keys, the less is left to be searched twice. Keys
            that are added later are encoded with the center of the first.

    Returns:
        :class:`KeyCodes`. No gradient.

    Raises:
        RuntimeError: on a bad argument, naming it, what was given and what is wanted.
    """
    if center is None:
        _checks.encode_keys(keys, keys.new_empty(keys.shape[-1:], dtype=torch.float32))
        center = mean_key(keys)
    codes, stats = call(_OP, keys, center)
    return KeyCodes(codes, stats, center)


def mean_key(keys: Tensor) -> Tensor:
    """(D,) float32: the mean of the rows (N, D) that are finite; 0 where there is none."""
    total = torch.zeros(keys.shape[1], dtype=torch.float64, device=keys.device)
    count = torch.zeros((), dtype=torch.float64, device=keys.device)
    step = max(1, _CENTER_BYTES // (4 * keys.shape[1]))
    for start in range(0, len(keys), step):
        rows = keys[start : start + step].float()
        held = rows.isfinite().all(1)
        total += torch.where(held[:, None], rows, 0.0).sum(0, dtype=torch.float64)
        count += held.sum()
    return (total / count.clamp_min(1)).float()


_OP = torch.ops.knnext.encode_keys.default


@torch.library.register_fake("knnext::encode_keys")
def _fake(keys: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    _checks.encode_keys(keys, center)
    codes = keys.new_empty(keys.shape, dtype=torch.int8)
    return codes, keys.new_empty((keys.shape[0], 3), dtype=torch.float32)


def _vmap(run: Any, batch: int, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    if in_dims[1] is not None:
        return one_by_one(run, batch, in_dims, *args)
    return as_rows(run, batch, in_dims, *args, shared=(1,))


register_no_derivative("encode_keys", _vmap)
