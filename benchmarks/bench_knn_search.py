"""knn_search against FAISS flat, chunked torch mm + topk, and the bare product that bounds both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import knnext

Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    queries: int
    entries: int
    dim: int
    k: int
    dtype: torch.dtype = torch.float16
    full: bool = False

    def __str__(self) -> str:
        return f"Q{self.queries}-N{self.entries}-D{self.dim}-k{self.k}-{self.dtype}".replace(
            "torch.", ""
        )


SHAPES = [
    Shape(1, 65536, 1024, 1024),
    Shape(16, 65536, 1024, 1024),
    Shape(256, 65536, 1024, 1024),
    Shape(1024, 65536, 1024, 1024),
    Shape(256, 65536, 1024, 1024, torch.bfloat16, full=True),
    Shape(256, 65536, 1024, 1024, torch.float32, full=True),
    Shape(256, 65536, 128, 1024, full=True),
    Shape(2048, 400_000, 128, 1024, full=True),
]


@dataclass(frozen=True)
class Data:
    shape: Shape
    device: str
    queries: Tensor
    keys: Tensor
    sqnorms: Tensor

    @property
    def k(self) -> int:
        return self.shape.k


@lru_cache(maxsize=1)
def make_data(shape: Shape, device: str) -> Data:
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int) -> Tensor:
        x = torch.randn(rows, shape.dim, device=device, generator=generator)
        return x.to(shape.dtype)

    keys = draw(shape.entries)
    return Data(shape, device, draw(shape.queries), keys, knnext.key_sqnorms(keys))


def search(data: Data) -> Callable[[], Result]:
    return lambda: knnext.knn_search(data.queries, data.keys, data.k)


def search_with_sqnorms(data: Data) -> Callable[[], Result]:
    return lambda: knnext.knn_search(data.queries, data.keys, data.k, key_sqnorms=data.sqnorms)


def faiss_flat(data: Data) -> Callable[[], Result]:
    """IndexFlatL2 on the same vectors in float32: twice the memory of half-precision keys."""
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (knnext[faiss])")
    if data.device == "cuda":
        pytest.skip("only the CPU index is measured here; FAISS on the GPU is not a rival yet")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(data.shape.dim)
    index.add(data.keys.float().numpy())
    queries = data.queries.float().numpy()

    def run() -> Result:
        distances, indices = index.search(queries, data.k)
        return torch.from_numpy(distances), torch.from_numpy(indices)

    return run


def torch_chunked(data: Data, rows: int = 65536) -> Callable[[], Result]:
    """What one writes without a library: product, topk, merge, chunk by chunk."""

    def run() -> Result:
        q = data.queries.float()
        best: Result | None = None
        for start in range(0, data.shape.entries, rows):
            x = data.keys[start : start + rows].float()
            norms = data.sqnorms[start : start + rows]
            d = torch.addmm(norms[None], q, x.T, alpha=-2)
            values, at = d.topk(min(data.k, x.shape[0]), largest=False)
            at = at + start
            if best is not None:
                values, at = torch.cat([best[0], values], 1), torch.cat([best[1], at], 1)
                values, order = values.topk(data.k, largest=False)
                at = at.gather(1, order)
            best = (values, at)
        assert best is not None
        return best[0] + q.square().sum(1, keepdim=True), best[1]

    return run


def bare_product(data: Data) -> Callable[[], None]:
    """Conversion and fp32 GEMM alone, in chunks whose result fits the cache's reach: no selection,
    so no answer."""
    rows = max(1024, (64 << 20) // max(1, 4 * data.shape.queries))
    out = torch.empty(data.shape.queries, rows, device=data.device)

    def run() -> None:
        q = data.queries.float()
        for start in range(0, data.shape.entries, rows):
            x = data.keys[start : start + rows].float()
            torch.mm(q, x.T, out=out[:, : x.shape[0]])

    return run


IMPLEMENTATIONS: dict[str, Callable[[Data], Callable[[], Result | None]]] = {
    "knnext": search,
    "knnext_sqnorms": search_with_sqnorms,
    "faiss_flat": faiss_flat,
    "torch_chunked": torch_chunked,
    "bare_product": bare_product,
}


@lru_cache(maxsize=1)
def exact_distances(shape: Shape, device: str) -> dict[int, Tensor]:
    """Of the first and the last query, in float64, block by block."""
    data = make_data(shape, device)
    return {
        row: torch.cat(
            [
                (x.double() - data.queries[row].double()).square().sum(1)
                for x in data.keys.split(8192)
            ]
        )
        for row in (0, shape.queries - 1)
    }


def check(data: Data, result: Result | None) -> None:
    """Distances of some queries against float64."""
    if result is None:
        return
    for row, exact in exact_distances(data.shape, data.device).items():
        want = exact.sort().values[: data.k]
        torch.testing.assert_close(result[0][row].double(), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(exact[result[1][row]], want, rtol=1e-4, atol=1e-4)


def test_knn_search(shape: Shape, device: str, implementation: str, measure) -> None:
    data = make_data(shape, device)
    run = IMPLEMENTATIONS[implementation](data)
    check(data, run())
    measure(
        run,
        group=f"knn_search {shape} {device}",
        device=device,
        flop=2.0 * shape.queries * shape.entries * shape.dim,
        bytes_moved=float(data.keys.nbytes),
        rounds=5,
        shape=str(shape),
    )
