"""The searches that are measured.

Default lists are short. The full ones vary one of Q, N, D, k and the dtype at a time around a few
bases: the whole grid of them would be some thousand shapes, and the plots read along one axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.data.cases import dtype_name

QUERIES = (1, 8, 64, 256, 1024, 4096, 16384)
ENTRIES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)
DIMS = (64, 128, 768, 1024, 4096)
KS = (16, 64, 256, 1024, 2048, 4096)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Shape:
    """`keys` is "gaussian", or "lm" or "smollm2": the hidden states of a language model
    (`real_keys`, `smollm2`), at most `entries` of them and of whatever dim they are.
    `approximate`: an approximate index is measured too; it takes longer to build than all other
    rivals take to run."""

    queries: int
    entries: int
    dim: int
    k: int
    dtype: torch.dtype = torch.float16
    keys: str = "gaussian"
    approximate: bool = True

    def __str__(self) -> str:
        text = f"Q{self.queries}-N{self.entries}-D{self.dim}-k{self.k}-{dtype_name(self.dtype)}"
        return text if self.keys == "gaussian" else f"{text}-{self.keys}"

    @property
    def key_bytes(self) -> int:
        return self.entries * self.dim * self.dtype.itemsize

    @property
    def flop(self) -> float:
        return 2.0 * self.queries * self.entries * self.dim

    def facts(self) -> dict[str, Any]:
        return {
            "Q": self.queries,
            "N": self.entries,
            "D": self.dim,
            "k": self.k,
            "dtype": dtype_name(self.dtype),
            "keys": self.keys,
        }


def sweep(base: Shape, field: str, values: Iterable[Any]) -> list[Shape]:
    return [replace(base, **{field: value}) for value in values]


def unique(*lists: Iterable[Shape]) -> list[Shape]:
    """Each once, in order, so that shapes with the same keys stay neighbors where they were."""
    return list({str(shape): shape for shapes in lists for shape in shapes}.values())


def _stars(small: Shape, large: Shape, entries: Iterable[int]) -> list[Shape]:
    """Every axis through a search bound by reading and one bound by arithmetic."""
    sizes = list(entries)
    return unique(
        sweep(large, "queries", QUERIES),
        *[sweep(replace(small, queries=q), "entries", sizes) for q in (1, 64)],
        sweep(large, "entries", sizes),
        *[sweep(base, "dim", DIMS) for base in (small, large)],
        *[sweep(base, "k", KS) for base in (small, large)],
        *[sweep(base, "dtype", DTYPES) for base in (small, large)],
        *[sweep(replace(base, keys="lm", dim=128), "k", KS) for base in (small, large)],
        sweep(replace(large, keys="lm", dim=128), "queries", QUERIES),
    )


SMOKE = [
    Shape(3, 3000, 64, 64),
    Shape(70, 10_000, 32, 100, torch.float32),
    Shape(16, 5000, 128, 64, keys="lm"),
]

_CPU = Shape(256, 65536, 1024, 1024)
_NARROW = Shape(64, 100_000, 128, 1024, approximate=False)
#: A step of decoding is one query, or a few where sequences are decoded together.
FEW_QUERIES = (1, 2, 4, 8, 16)


def _few_queries(entries: int, dim: int, queries: Iterable[int] = FEW_QUERIES) -> list[Shape]:
    """Of few neighbors and of many. IVF-PQ, slow to build, stands beside one of the widths."""
    base = Shape(1, entries, dim, 1, approximate=dim == 576)
    return [s for k in (16, 1024) for s in sweep(replace(base, k=k), "queries", queries)]


_REAL = [
    *sweep(Shape(1, 1_000_000, 128, 1024, keys="lm"), "queries", (1, 16, 256)),
    *sweep(Shape(1, 200_000, 576, 1024, keys="smollm2"), "queries", (1, 16, 1024)),
]
CPU = unique(
    sweep(_CPU, "queries", (1, 16, 256, 1024)),
    sweep(_NARROW, "k", (16, 256, 1024, 4096)),
    sweep(_NARROW, "entries", (25_000, 100_000, 400_000)),
    _few_queries(200_000, 576),
    *[_few_queries(200_000, dim, (1, 4, 16)) for dim in (128, 1024)],
    _REAL,
)
FULL_CPU = unique(
    CPU,
    *[_few_queries(n, dim) for n in (200_000, 1_000_000) for dim in (128, 576, 1024)],
    *[sweep(Shape(1024, 1_000_000, dim, 1024), "queries", (1024, 4096)) for dim in (128, 576)],
    *[sweep(Shape(q, 200_000, 576, 1024), "dtype", DTYPES) for q in (1, 16)],
    sweep(_REAL[-1], "queries", FEW_QUERIES),
    _stars(replace(_CPU, queries=16), _CPU, (16384, 65536, 262_144)),
)

# The order is that of importance: a run that is cut short has the targets' shapes.
_GPU = Shape(4096, 1_000_000, 1024, 1024)
_LARGE = Shape(64, 10_000_000, 1024, 1024, approximate=False)
_OTHER = replace(_GPU, approximate=False)
CUDA = unique(
    sweep(_GPU, "queries", (4096, 64, 192, 1024)),
    sweep(_LARGE, "queries", (64, 16, 1)),
    [Shape(4096, 1_000_000, 128, 1024, keys="lm")],
    [replace(_OTHER, k=2048), replace(_OTHER, queries=16384)],
    [replace(_OTHER, dtype=torch.bfloat16), replace(_OTHER, dim=256)],
    [Shape(64, 100_000, 1024, 1024, approximate=False)],
)
FULL_CUDA = unique(
    CUDA, [replace(_LARGE, queries=8)], _stars(replace(_GPU, queries=64), _GPU, ENTRIES)
)

SHAPES = {
    "smoke": SMOKE,
    "cpu": CPU,
    "cuda": CUDA,
    "full cpu": FULL_CPU,
    "full cuda": FULL_CUDA,
}
