"""rescore against the gather that torch needs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import knnext
from benchmarks.data.cases import Implementation
from benchmarks.data.search import Data, make_data
from benchmarks.data.search_shapes import Shape as SearchShape
from benchmarks.timing.measure import Measure, Memory, Work


@dataclass(frozen=True)
class Shape:
    """`width` candidates a query, drawn from all entries."""

    queries: int
    entries: int
    dim: int
    width: int

    def __str__(self) -> str:
        return f"Q{self.queries}-N{self.entries}-D{self.dim}-m{self.width}-float16"

    @property
    def search(self) -> SearchShape:
        return SearchShape(self.queries, self.entries, self.dim, 1)


_SHORT = [Shape(64, 65536, 1024, 1024), Shape(256, 400_000, 128, 1024)]
_CUDA = [Shape(64, 1_000_000, 1024, 1024), Shape(1024, 1_000_000, 1024, 1024)]
SHAPES = {
    "smoke": [Shape(5, 3000, 72, 50)],
    "cpu": _SHORT,
    "cuda": _CUDA,
    "full cpu": [*_SHORT, Shape(1024, 65536, 1024, 1024)],
    "full cuda": [*_CUDA, Shape(4096, 10_000_000, 128, 1024)],
}

Prepared = Callable[[Data, Tensor], Callable[[], Tensor]]


def torch_gather(data: Data, indices: Tensor) -> Callable[[], Tensor]:
    """(Q, m, D) in float32 is held, here in batches of 16 queries."""

    def run() -> Tensor:
        parts = []
        for q, i in zip(data.queries.split(16), indices.split(16), strict=True):
            rows = data.keys[i].float()
            parts.append((q.float()[:, None] - rows).square().sum(-1))
        return torch.cat(parts)

    return run


def fused(data: Data, indices: Tensor) -> Callable[[], Tensor]:
    return lambda: knnext.rescore(data.queries, data.keys, indices)


def _of(prepare: Prepared) -> Implementation:
    return Implementation(lambda given: prepare(*given), capturable=True)


IMPLEMENTATIONS = {"knnext": _of(fused), "torch_gather": _of(torch_gather)}


def test_rescore(shape: Shape, device: str, implementation: str, measure: Measure) -> None:
    sets = make_data(shape.search, device)
    chosen = IMPLEMENTATIONS[implementation]
    memory = Memory(device, chosen.own_memory)
    sizes = (shape.queries, shape.width)
    given = [(data, torch.randint(0, shape.entries, sizes, device=device)) for data in sets]
    runs = [chosen.prepare(pair) for pair in given]
    result, facts = memory.watch(runs[0])
    data, indices = given[0]
    rows = data.keys[indices[:2]].double()
    want = (data.queries[:2].double()[:, None] - rows).square().sum(-1)
    torch.testing.assert_close(result[:2].double(), want, rtol=1e-5, atol=0)
    pairs = shape.queries * shape.width
    moved = data.queries.nbytes + pairs * (shape.dim * data.keys.element_size() + 12)
    measure(
        runs,
        implementation=chosen,
        work=Work(float(moved), 3.0 * pairs * shape.dim, "read"),
        group=f"rescore {shape}",
        rounds=5,
        op="rescore",
        shape=str(shape),
        Q=shape.queries,
        N=shape.entries,
        D=shape.dim,
        m=shape.width,
        dtype="float16",
        **facts,
    )
