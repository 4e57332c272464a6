"""Queries and keys of a search shape, and how near a result comes to the truth in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import knnext
from benchmarks.data import real_keys, smollm2
from benchmarks.data.buffers import l2_bytes, rotations
from benchmarks.data.search_shapes import Shape
from knnext.testing import tensor_core_tolerance

Result = tuple[Tensor, Tensor]
SAMPLED_QUERIES = 16
_CHUNK_VALUES = 1 << 26
#: What is built over more bytes of keys than this is not kept: several such would not fit.
_KEPT_BYTES = 1 << 29
#: Where real keys come from, by their name in a shape.
_SOURCES = {"lm": real_keys, "smollm2": smollm2}


@dataclass(frozen=True, eq=False)
class Keys:
    """One set of keys; `derived` holds what is built over them and outlives one shape."""

    keys: Tensor
    sqnorms: Tensor
    derived: dict[str, Any] = field(default_factory=dict)

    def kept(self, name: str, build: Callable[[], Any]) -> Any:
        """What `build` gives, once for all shapes over these keys where these are few."""
        if self.keys.nbytes > _KEPT_BYTES:
            return build()
        if name not in self.derived:
            self.derived[name] = build()
        return self.derived[name]


@dataclass(frozen=True, eq=False)
class Data:
    """One set of buffers; `shape` tells the sizes that there are."""

    shape: Shape
    device: str
    queries: Tensor
    key_set: Keys

    @property
    def keys(self) -> Tensor:
        return self.key_set.keys

    @property
    def sqnorms(self) -> Tensor:
        return self.key_set.sqnorms

    @property
    def k(self) -> int:
        return self.shape.k

    @property
    def bytes(self) -> float:
        """What an exact search must at least move: keys, queries, results."""
        results = 12 * self.shape.queries * self.k
        return float(self.keys.nbytes + self.queries.nbytes + results)


@lru_cache(maxsize=1)
def make_data(shape: Shape, device: str) -> tuple[Data, ...]:
    """As many sets as turn the cache over: one on a CPU. Skips where the memory is too small."""
    sets = make_keys(shape.keys, shape.entries, shape.dim, shape.dtype, device)
    sizes = replace(shape, entries=len(sets[0].keys), dim=sets[0].keys.shape[1])
    queries = _queries(sizes, device)
    return tuple(Data(sizes, device, q, keys) for q, keys in zip(queries, sets, strict=False))


@lru_cache(maxsize=1)
def make_keys(
    kind: str, entries: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[Keys, ...]:
    size = entries * dim * dtype.itemsize
    sets = rotations(size, l2_bytes(device), most=64) if device == "cuda" else 1
    require_memory(int(size * sets / 0.8), device, "the keys")
    if kind in _SOURCES:
        first = _SOURCES[kind].load_keys(entries).to(device, dtype)
        made = [first, *(first.clone() for _ in range(sets - 1))]
    else:
        generator = torch.Generator(device).manual_seed(0)
        made = [_gaussian(entries, dim, dtype, generator) for _ in range(sets)]
    return tuple(Keys(keys, knnext.key_sqnorms(keys)) for keys in made)


def _queries(shape: Shape, device: str) -> Iterator[Tensor]:
    """One set after the other, without end."""
    generator = torch.Generator(device).manual_seed(1)
    while True:
        if shape.keys in _SOURCES:
            found = _SOURCES[shape.keys].load_queries(shape.queries)
            yield found.to(device, shape.dtype)
        else:
            yield _gaussian(shape.queries, shape.dim, shape.dtype, generator)


def _gaussian(rows: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    out = torch.empty(rows, dim, dtype=dtype, device=generator.device)
    for part in out.split(max(1, _CHUNK_VALUES // dim)):
        part.copy_(torch.randn(part.shape, device=generator.device, generator=generator))
    return out


def free_bytes(device: str) -> int:
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def require_memory(size: int, device: str, what: str) -> None:
    free = free_bytes(device)
    if size > free:
        pytest.skip(
            f"{what} would need {size / 1e9:.1f} GB; {free / 1e9:.1f} GB are free on {device}"
        )


@dataclass(frozen=True)
class Truth:
    """Of some queries: all distances in float64 (rows, N), the sorted k nearest (rows, k), and how
    far float32 sums may be off, (rows, 1)."""

    rows: list[int]
    distances: Tensor
    nearest: Tensor
    slack: Tensor


@lru_cache(maxsize=1)
def truth_of(data: Data) -> Truth:
    count = data.shape.queries
    rows = sorted({i * (count - 1) // (SAMPLED_QUERIES - 1) for i in range(SAMPLED_QUERIES)})
    q = data.queries[rows].double()
    step = max(1, _CHUNK_VALUES // 4 // data.shape.dim)
    distances = torch.cat([_squared_distances(q, x.double()) for x in data.keys.split(step)], 1)
    nearest = distances.topk(min(data.k, distances.shape[1]), largest=False).values
    scale = q.square().sum(1, keepdim=True) + data.sqnorms.max().double()
    return Truth(rows, distances, nearest, tensor_core_tolerance(data.shape.dim) * scale)


def _squared_distances(q: Tensor, x: Tensor) -> Tensor:
    return (q.square().sum(1, keepdim=True) - 2 * q @ x.T + x.square().sum(1)).clamp_(min=0)


def recall(data: Data, result: Result) -> float:
    """The share of the k nearest that the sampled queries got, ties and near-ties allowed for.

    An index counts once, and where its true distance is at most the k-th, rounding apart.
    """
    truth = truth_of(data)
    bounds = truth.nearest[:, -1:] + truth.slack
    got = 0
    for place, row in enumerate(truth.rows):
        found = result[1][row].to(truth.distances.device).unique()
        found = found[found >= 0]
        got += int((truth.distances[place][found] <= bounds[place]).sum())
    return got / truth.nearest.numel()


def assert_exact(data: Data, result: Result) -> None:
    """Distances rank by rank, each right for its index, and nothing nearer left out."""
    truth = truth_of(data)
    width = truth.nearest.shape[1]
    distances = result[0][truth.rows, :width].to(truth.distances)
    indices = result[1][truth.rows, :width].to(truth.distances.device)
    slack = truth.slack
    assert ((distances - truth.nearest).abs() <= slack).all(), "a distance is wrong at its rank"
    of_index = truth.distances.gather(1, indices)
    assert ((distances - of_index).abs() <= slack).all(), "a distance is not that of its index"
    assert recall(data, result) == 1.0, "a nearer key was left out"
