"""What one writes without a library, what its compiler makes of it, and the bare product.

On a GPU the product runs in the keys' own dtype, and so is its result: in half precision distances
are rounded to eleven bits, so some of the k nearest are missed, and the recall is reported. With
`float32` the product comes out in float32, exact but of twice the traffic. On a CPU keys are
converted first, since torch's half-precision products are slow there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from benchmarks.data.search import Data, Result
from benchmarks.data.search_shapes import Shape
from benchmarks.timing.limits import seconds_of

Step = Callable[[Tensor, Tensor, Tensor, int], Result]
#: Values of one chunk's distances: half a gigabyte in half precision.
CHUNK_VALUES = 1 << 28
MIN_ROWS = 65536
#: Bytes of the bare product's result at a time; the faster of these counts.
PRODUCT_BYTES = (64 << 20, 1 << 30)
_best_bytes: dict[Shape, int] = {}


def chunk_rows(queries: int) -> int:
    return max(MIN_ROWS, CHUNK_VALUES // queries)


def nearest_in_chunk(queries: Tensor, keys: Tensor, sqnorms: Tensor, k: int) -> Result:
    """Distances less |q|^2, which moves no order, and where they stand."""
    scores = torch.sub(sqnorms, queries @ keys.T, alpha=2)
    return scores.topk(k, largest=False)


def nearest_in_chunk_float32(queries: Tensor, keys: Tensor, sqnorms: Tensor, k: int) -> Result:
    if queries.dtype != torch.float32:
        product = torch.mm(queries, keys.T, out_dtype=torch.float32)
        scores = torch.sub(sqnorms, product, alpha=2)
    else:
        scores = torch.addmm(sqnorms, queries, keys.T, alpha=-2)
    return scores.topk(k, largest=False)


@cache
def compiled(step: Step) -> Step:
    """One graph for all sizes: a graph for each would compile for longer than it runs."""
    return torch.compile(step, dynamic=True)


def chunked(data: Data, step: Step) -> Callable[[], Result]:
    """Product, topk and merge, chunk by chunk."""
    rows, k, cpu = chunk_rows(data.shape.queries), data.k, data.device == "cpu"

    def run() -> Result:
        q = data.queries.float() if cpu else data.queries
        best: Result | None = None
        for start in range(0, data.shape.entries, rows):
            x = data.keys[start : start + rows]
            x = x.float() if cpu else x
            norms = data.sqnorms[start : start + rows]
            values, at = step(q, x, norms, min(k, x.shape[0]))
            best = _merged(best, values, at + start, k)
        assert best is not None
        return best[0] + data.queries.float().square().sum(1, keepdim=True), best[1]

    return run


def _merged(best: Result | None, values: Tensor, at: Tensor, k: int) -> Result:
    if best is None:
        return values, at
    values, at = torch.cat([best[0], values], 1), torch.cat([best[1], at], 1)
    values, order = values.topk(k, largest=False)
    return values, at.gather(1, order)


def torch_chunked(data: Data) -> Callable[[], Result]:
    step = nearest_in_chunk_float32 if data.device == "cpu" else nearest_in_chunk
    return chunked(data, step)


def torch_chunked_float32(data: Data) -> Callable[[], Result]:
    return chunked(data, nearest_in_chunk_float32)


def torch_compiled(data: Data) -> Callable[[], Result]:
    step = nearest_in_chunk_float32 if data.device == "cpu" else nearest_in_chunk
    return chunked(data, compiled(step))


def bare_product(data: Data) -> Callable[[], None]:
    """The matrix product and no more, so no answer: cuBLAS in the keys' dtype on a GPU, conversion
    and float32 mm on a CPU. Its result goes to one buffer again and again."""
    queries, keys = data.queries, data.keys
    if data.device == "cpu":
        return _product_on_cpu(queries, keys)
    if data.shape not in _best_bytes:
        _best_bytes[data.shape] = min(
            PRODUCT_BYTES,
            key=lambda size: seconds_of(_product_in_chunks(queries, keys, size), "cuda"),
        )
    return _product_in_chunks(queries, keys, _best_bytes[data.shape])


def _product_in_chunks(queries: Tensor, keys: Tensor, size: int) -> Callable[[], None]:
    rows = max(8192, size // (queries.element_size() * len(queries)) // 256 * 256)
    out = queries.new_empty(len(queries), min(rows, len(keys)))
    last = queries.new_empty(len(queries), len(keys) % out.shape[1])

    def run() -> None:
        for x in keys.split(out.shape[1]):
            torch.mm(queries, x.T, out=out if len(x) == out.shape[1] else last)

    return run


def _product_on_cpu(queries: Tensor, keys: Tensor) -> Callable[[], None]:
    rows = max(1024, PRODUCT_BYTES[0] // (4 * len(queries)))
    out = torch.empty(len(queries), rows)

    def run() -> None:
        q = queries.float()
        for x in keys.split(rows):
            torch.mm(q, x.float().T, out=out[:, : len(x)])

    return run
