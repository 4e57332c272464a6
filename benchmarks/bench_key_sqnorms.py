"""key_sqnorms against the torch expressions for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import knnext
from benchmarks.data.cases import Implementation
from benchmarks.data.search import Data, make_data
from benchmarks.data.search_shapes import Shape
from benchmarks.timing.measure import Measure, Memory, Work

# Neither queries nor k matter here.
_SHAPE = Shape(1, 65536, 1024, 1)
_LARGE = Shape(1, 1_000_000, 1024, 1)
SHAPES = {
    "smoke": [Shape(1, 3000, 72, 1)],
    "cpu": [_SHAPE],
    "cuda": [_LARGE],
    "full cpu": [
        _SHAPE,
        Shape(1, 65536, 1024, 1, torch.bfloat16),
        Shape(1, 65536, 1024, 1, torch.float32),
        Shape(1, 400_000, 128, 1),
    ],
    "full cuda": [
        _LARGE,
        Shape(1, 1_000_000, 1024, 1, torch.bfloat16),
        Shape(1, 1_000_000, 1024, 1, torch.float32),
        Shape(1, 10_000_000, 128, 1),
        Shape(1, 10_000_000, 1024, 1),
    ],
}


def _of(expression: Callable[[Tensor], Tensor]) -> Implementation:
    def prepare(data: Data) -> Callable[[], Tensor]:
        return lambda: expression(data.keys)

    return Implementation(prepare, capturable=True)


IMPLEMENTATIONS = {
    "knnext": _of(knnext.key_sqnorms),
    "torch_float_square_sum": _of(lambda keys: keys.float().square().sum(1)),
    "torch_vector_norm": _of(
        lambda keys: torch.linalg.vector_norm(keys, dim=1, dtype=torch.float32).square()
    ),
}


def test_key_sqnorms(shape: Shape, device: str, implementation: str, measure: Measure) -> None:
    sets = make_data(shape, device)
    data, chosen = sets[0], IMPLEMENTATIONS[implementation]
    memory = Memory(device, chosen.own_memory)
    runs = [chosen.prepare(each) for each in sets]
    result, facts = memory.watch(runs[0])
    head = slice(0, 10_000)
    want = data.keys[head].double().square().sum(1)
    torch.testing.assert_close(result[head].double(), want, rtol=1e-5, atol=0)
    name = str(shape).split("-", 1)[1].replace("-k1-", "-")
    sizes = shape.facts()
    measure(
        runs,
        implementation=chosen,
        work=Work(float(data.keys.nbytes + 4 * shape.entries), memory="read"),
        group=f"key_sqnorms {name}",
        op="key_sqnorms",
        shape=name,
        **{field: sizes[field] for field in ("N", "D", "dtype")},
        **facts,
    )
