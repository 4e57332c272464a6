"""merge_topk against torch.topk, which leaves ties and padding as they fall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import knnext
from benchmarks.data.buffers import l2_bytes, rotations
from benchmarks.data.cases import Implementation
from benchmarks.timing.measure import Measure, Memory, Work

Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    queries: int
    width: int
    k: int

    def __str__(self) -> str:
        return f"Q{self.queries}-m{self.width}-k{self.k}"

    @property
    def bytes(self) -> int:
        return 12 * self.queries * (self.width + self.k)


_SHORT = [Shape(1024, 2048, 1024), Shape(1024, 8192, 1024)]
_FULL = [*_SHORT, Shape(1, 65536, 1024), Shape(4096, 128, 64)]
SHAPES = {
    "smoke": [Shape(5, 300, 100)],
    "cpu": _SHORT,
    "cuda": _SHORT,
    "full cpu": _FULL,
    "full cuda": _FULL,
}

Pair = tuple[Tensor, Tensor, int]


def torch_topk(pair: Pair) -> Callable[[], Result]:
    distances, indices, k = pair

    def run() -> Result:
        values, at = distances.topk(k, largest=False)
        return values, indices.gather(1, at)

    return run


def fused(pair: Pair) -> Callable[[], Result]:
    return lambda: knnext.merge_topk(*pair)


IMPLEMENTATIONS = {
    "knnext": Implementation(fused, capturable=True),
    "torch_topk": Implementation(torch_topk, capturable=True),
}


def _pair(shape: Shape, device: str) -> Pair:
    distances = torch.rand(shape.queries, shape.width, device=device)
    indices = torch.randint(0, 1 << 40, distances.shape, device=device)
    return distances, indices, shape.k


def test_merge_topk(shape: Shape, device: str, implementation: str, measure: Measure) -> None:
    chosen = IMPLEMENTATIONS[implementation]
    memory = Memory(device, chosen.own_memory)
    count = rotations(shape.bytes, l2_bytes(device)) if device == "cuda" else 1
    pairs = [_pair(shape, device) for _ in range(count)]
    runs = [chosen.prepare(pair) for pair in pairs]
    result, facts = memory.watch(runs[0])
    want = pairs[0][0].sort(1).values[:, : shape.k]
    torch.testing.assert_close(result[0], want, rtol=0, atol=0)
    measure(
        runs,
        implementation=chosen,
        work=Work(float(shape.bytes)),
        group=f"merge_topk {shape}",
        op="merge_topk",
        shape=str(shape),
        Q=shape.queries,
        m=shape.width,
        k=shape.k,
        **facts,
    )
