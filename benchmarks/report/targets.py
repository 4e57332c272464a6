"""The targets, as data: what is asked of which shapes, and whether the rows at hand reach it.

They hold on one H200, as ratios within one run. `portable` targets are those of the kernels for any
GPU from sm_80 up, `hopper` those of the sm_90a kernels (KNNEXT_SM90=1). A search is asked with its
key norms given, as a datastore does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.rows import Row

Value = Callable[[Row, Sequence[Row]], float | None]
#: Asked of a row, or of a shape's own facts: of what gives facts by name.
Shapes = Callable[[Any], bool]


@dataclass(frozen=True)
class Target:
    kernels: str
    op: str
    what: str
    shapes: Shapes
    value: Value
    bound: float
    unit: str
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    @property
    def wanted(self) -> str:
        text = f"{100 * self.bound:.0f} %" if self.unit == "%" else f"{self.bound:g}x"
        return f"{'at most' if self.at_most else 'at least'} {text}"

    def shown(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.unit == "%" else f"{value:.2f}x"


@dataclass(frozen=True)
class Verdict:
    target: Target
    row: Row
    value: float

    @property
    def met(self) -> bool:
        return self.target.met(self.value)


def fact(name: str) -> Value:
    return lambda row, _: row[name]


def over_product(row: Row, _: Sequence[Row]) -> float | None:
    share = row["share_of_gemm"]
    return 1.0 / share if share else None


def over_limit(row: Row, _: Sequence[Row]) -> float | None:
    share = row["share_of_limit"]
    return 1.0 / share if share else None


def against(*prefixes: str) -> Value:
    """How many times the fastest rival's time is ours; None without a rival. What is approximate
    is no rival of an exact search."""

    def value(row: Row, group: Sequence[Row]) -> float | None:
        times = [
            r.seconds
            for r in group
            if r.implementation.startswith(prefixes)
            and not r.implementation.startswith(("knnext", "bare"))
            and not r.approximate
        ]
        return min(times) / row.seconds if times else None

    return value


def _search(
    row: Row, *, d: int = 1024, k: int = 1024, dtypes: tuple[str, ...] = ("float16",)
) -> bool:
    return row["D"] == d and row["k"] == k and row["dtype"] in dtypes


def _small(row: Row) -> bool:
    return _search(row) and 1 <= row["Q"] <= 64 and row["N"] == 10_000_000


def _large(row: Row) -> bool:
    return _search(row) and row["Q"] == 4096 and row["N"] == 1_000_000


def _larger(row: Row) -> bool:
    return (
        _search(row, dtypes=("float16", "bfloat16"))
        and 4096 <= row["Q"] <= 16384
        and row["N"] >= 1_000_000
    )


def _harder(row: Row) -> bool:
    deep, narrow = _search(row, k=2048), _search(row, d=256)
    return (deep or narrow) and 4096 <= row["Q"] <= 16384 and row["N"] >= 1_000_000


def _between(row: Row) -> bool:
    return _search(row) and 64 <= row["Q"] <= 192 and row["N"] >= 1_000_000


def _mixing(row: Row) -> bool:
    return row["Q"] == 1024 and row["k"] == 1024 and 33_000 <= row["V"] <= 263_000


def _many(row: Row) -> bool:
    return row["Q"] >= 1024


def _any(row: Row) -> bool:
    return True


_FAISS = against("faiss_gpu_flat", "faiss_knn_gpu")
_EVERY = against("faiss", "cuvs", "torch")
_PYTORCH = against("torch_eager")

_READ, _COPY = fact("share_of_read"), fact("share_of_copy")
_SOFTMAX, _MIX, _TARGET = "knn_softmax", "knn_interpolate", "knn_target_log_prob"


def _at_least(kernels: str, op: str, bound: float, what: str, at: Shapes, value: Value) -> Target:
    return Target(kernels, op, what, at, value, bound, "%" if what.startswith("of ") else "x")


def _at_most(kernels: str, op: str, bound: float, what: str, at: Shapes, value: Value) -> Target:
    return Target(kernels, op, what, at, value, bound, "x", at_most=True)


_PORTABLE = (
    ("knn_search", 0.6, "of read bandwidth", _small, _READ),
    ("knn_search", 0.35, "of the bare product", _large, fact("share_of_gemm")),
    ("knn_search", 1.0, "the speed of the fastest flat rival", _large, _EVERY),
    ("knn_search", 3.0, "the speed of FAISS GPU flat", _any, _FAISS),
    (_SOFTMAX, 0.8, "of copy bandwidth", _mixing, _COPY),
    (_SOFTMAX, 3.0, "the speed of the PyTorch calls", _mixing, _PYTORCH),
    (_MIX, 0.8, "of copy bandwidth", _mixing, _COPY),
    (_MIX, 3.0, "the speed of the PyTorch calls", _mixing, _PYTORCH),
    (_TARGET, 10.0, "the speed of the PyTorch calls", _mixing, against("torch_whole_row")),
)
_HOPPER = (
    ("knn_search", 0.9, "of read bandwidth", _small, _READ),
    ("knn_search", 5.0, "the speed of FAISS GPU flat", _any, _FAISS),
    ("knn_search", 3.0, "the speed of cuVS", _any, against("cuvs")),
    ("knn_search", 3.0, "the speed of chunked torch", _many, against("torch")),
    ("knn_search", 1.0, "the speed of the fastest flat rival", _any, _EVERY),
)
_HOPPER_TIMES = (
    ("knn_search", 1.15, "the bare product's time", _larger, over_product),
    ("knn_search", 1.35, "the bare product's time", _harder, over_product),
    ("knn_search", 1.25, "the nearer limit's time", _between, over_limit),
)
TARGETS = (
    *(_at_least("portable", *target) for target in _PORTABLE),
    *(_at_least("hopper", *target) for target in _HOPPER),
    *(_at_most("hopper", *target) for target in _HOPPER_TIMES),
)
_OURS = {
    ("portable", "knn_search"): "knnext_sqnorms",
    ("hopper", "knn_search"): "knnext_sqnorms (sm90)",
}


def names_shape(op: str, shape: Any) -> bool:
    """Whether a portable target is about this very shape of a benchmark, and not about any."""
    return any(
        target.shapes(shape.facts())
        for target in TARGETS
        if target.kernels == "portable" and target.op == op and target.shapes is not _any
    )


def verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    """Of every target at every shape whose rows are there, GPUs only."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for target in TARGETS:
        ours = _OURS.get((target.kernels, target.op), "knnext")
        for row in rows:
            if row.device != "cuda" or row.op != target.op or row.implementation != ours:
                continue
            value = target.value(row, groups[row.group]) if target.shapes(row) else None
            if value is not None:
                yield Verdict(target, row, value)
