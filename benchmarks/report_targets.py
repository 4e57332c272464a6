"""The targets, as data: what is asked of which shapes, and whether the rows at hand reach it.

They hold on one H200, as ratios within one run. `portable` targets are those of the kernels for any
GPU from sm_80 up, `hopper` those of the sm_90a kernels (KNNEXT_SM90=1). A search is asked with its
key norms given, as a datastore does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from report_rows import Row

Value = Callable[[Row, Sequence[Row]], float | None]


@dataclass(frozen=True)
class Target:
    kernels: str
    op: str
    what: str
    shapes: Callable[[Row], bool]
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


def against(*prefixes: str, leave_out: tuple[str, ...] = ()) -> Value:
    """How many times the fastest rival's time is ours; None without a rival."""

    def value(row: Row, group: Sequence[Row]) -> float | None:
        times = [
            r.seconds
            for r in group
            if r.implementation.startswith(prefixes)
            and not r.implementation.startswith((*leave_out, "knnext", "bare"))
        ]
        return min(times) / row.seconds if times else None

    return value


def _search(row: Row, *, d: int = 1024, k: int = 1024, dtypes: tuple[str, ...] = ("float16",)):
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


def _any(row: Row) -> bool:
    return True


# Approximate: no rival of an exact search.
_NOT_EXACT = ("faiss_ivfpq",)
_FAISS = against("faiss_gpu_flat", "faiss_knn_gpu")
_EVERY = against("faiss", "cuvs", "torch", leave_out=_NOT_EXACT)
_PYTORCH = against("torch_eager")

TARGETS = (
    Target("portable", "knn_search", "of read bandwidth", _small, fact("share_of_read"), 0.6, "%"),
    Target(
        "portable", "knn_search", "of the bare product", _large, fact("share_of_gemm"), 0.35, "%"
    ),
    Target(
        "portable", "knn_search", "the speed of the fastest flat rival", _large, _EVERY, 1.0, "x"
    ),
    Target("portable", "knn_search", "the speed of FAISS GPU flat", _any, _FAISS, 3.0, "x"),
    Target(
        "portable", "knn_softmax", "of copy bandwidth", _mixing, fact("share_of_copy"), 0.8, "%"
    ),
    Target(
        "portable", "knn_softmax", "the speed of the PyTorch calls", _mixing, _PYTORCH, 3.0, "x"
    ),
    Target(
        "portable", "knn_interpolate", "of copy bandwidth", _mixing, fact("share_of_copy"), 0.8, "%"
    ),
    Target(
        "portable", "knn_interpolate", "the speed of the PyTorch calls", _mixing, _PYTORCH, 3.0, "x"
    ),
    Target(
        *("portable", "knn_target_log_prob", "the speed of the PyTorch calls"),
        *(_mixing, against("torch_whole_row"), 10.0, "x"),
    ),
    Target("hopper", "knn_search", "of read bandwidth", _small, fact("share_of_read"), 0.9, "%"),
    Target(
        "hopper", "knn_search", "the bare product's time", _larger, over_product, 1.15, "x", True
    ),
    Target(
        "hopper", "knn_search", "the bare product's time", _harder, over_product, 1.35, "x", True
    ),
    Target(
        "hopper", "knn_search", "the nearer limit's time", _between, over_limit, 1.25, "x", True
    ),
    Target("hopper", "knn_search", "the speed of FAISS GPU flat", _any, _FAISS, 5.0, "x"),
    Target("hopper", "knn_search", "the speed of cuVS", _any, against("cuvs"), 3.0, "x"),
    Target(
        *("hopper", "knn_search", "the speed of chunked torch"),
        *(lambda row: row["Q"] >= 1024, against("torch"), 3.0, "x"),
    ),
    Target("hopper", "knn_search", "the speed of the fastest flat rival", _any, _EVERY, 1.0, "x"),
)
_OURS = {
    ("portable", "knn_search"): "knnext_sqnorms",
    ("hopper", "knn_search"): "knnext_sqnorms (sm90)",
}


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
